"""From text to sequences, on the host, in NumPy.

  documents.py   reads documents from files
  corpus.py      splits them into train and held-out, tokenizes them once, and caches the result
  shuffling.py   random numbers and orders that depend on their place alone
  packing.py     makes rows of one length, for training and for evaluation
  loader.py      reads batches of rows ahead, of these rows or any others (`Rows`)


    corpus = prepare_corpus(files="books/*.jsonl.gz", vocab_size=8192)
    special = corpus.tokenizer.special
    rows = PackedSequences(corpus.train, special, sequence_length=4096, seed=0, fim_rate=0.1)
    loader = Loader(rows)
    batch = loader.take(8)  # {"tokens": int32 [8, T+1], "segment_ids": int32 [8, T+1]}
    state = loader.state()  # small, for the checkpoint; loader.restore(state) resumes from it
    evaluation = heldout_sequences(corpus.heldout, special, sequence_length=4096)

No file imports jax. Grain, which does, is imported when a Loader first reads.
"""

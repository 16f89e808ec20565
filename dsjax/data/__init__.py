"""From text to sequences, on the host, in NumPy.

  decompression.py  opens files, decompressed
  records.py        reads the records of JSON lines, CSV, parquet and Arrow
  folders.py        finds files by glob, though links go in circles
  documents.py      finds files, and reads their documents
  splitting.py      divides documents into train and held-out
  corpus.py         tokenizes both once, and caches the result
  shuffling.py      random numbers and orders that depend on their place alone
  packing.py        makes rows of one length, for training and for evaluation
  mixture.py        mixes the rows of several sets of documents by weight
  loader.py         reads batches of rows ahead, of these rows or any others (`Rows`)

    corpus = prepare_corpus(files="books/*.jsonl.gz", vocab_size=8192)
    special = corpus.tokenizer.special
    rows = PackedSequences(corpus.train, special, sequence_length=4096, seed=0, fim_rate=0.1)
    loader = Loader(rows)
    batch = loader.take(8)  # {"tokens": int32 [8, T+1], "segment_ids": int32 [8, T+1]}
    state = loader.state()  # small, for the checkpoint; loader.restore(state) resumes from it
    evaluation = heldout_sequences(corpus.heldout, special, sequence_length=4096)

No file imports jax. Grain, which does, is imported when a Loader first reads.
"""

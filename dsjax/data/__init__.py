"""From text to sequences, on the host, in numpy.

documents.py reads text, tokenizer.py encodes it, corpus.py splits it and does both once, packing.py
makes rows of one length, loader.py reads them ahead:

    corpus = prepare_corpus(files="books/*.jsonl.gz", vocab_size=8192)
    special = corpus.tokenizer.special
    rows = PackedSequences(corpus.train, special, sequence_length=4096, seed=0, fim_rate=0.1)
    loader = Loader(rows)
    batch = loader.take(8)  # {"tokens": int32 [8, T+1], "segment_ids": int32 [8, T+1]}
    state = loader.state()  # small, for the checkpoint; loader.restore(state) goes on from there
    evaluation = heldout_sequences(corpus.heldout, special, sequence_length=4096)

Nothing here imports jax; grain, which does, is imported when a Loader first reads.
"""

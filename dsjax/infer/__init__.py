"""Using a checkpoint: answering, continuing and scoring text or tokens.

answers      text in, text out: requests to an engine, and its tokens as text
console      what tools/generate.py does: one answer, a chat, or token ids
score        what tools/score.py does: log-likelihoods and raw logits
windows      text cut into windows that a model can read, packed into rows
token_files  token ids and arrays as .npy files
weights      the element type to load weights in on this machine
harness      the model `dsjax` of lm-evaluation-harness
"""

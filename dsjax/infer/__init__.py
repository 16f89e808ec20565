"""Using a checkpoint: answering, continuing and scoring text or tokens.

answers      text in, text out: requests to an engine, and its tokens as text
console      what tools/generate.py does: one answer, a chat, or token ids
pictured     conversations with pictures, as Janus and DeepSeek-VL have them
tiled        the same of DeepSeek-VL2
looking      what turns the pictures of a conversation into embeddings
places       the places that a reply names, as a table and as a drawing
drawing      what tools/draw.py does: pictures of a prompt, as PNG files
drawn_tokens the same of prompt ids, as arrays
filled       pictures in the place of token ids' placeholders
score        what tools/score.py does: log-likelihoods and raw logits
windows      text cut into windows that a model can read, packed into rows
token_files  token ids and arrays as .npy files
weights      the element type to load weights in on this machine
harness      the model `dsjax` of lm-evaluation-harness
"""

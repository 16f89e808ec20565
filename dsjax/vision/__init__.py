"""Pictures: read as the published models read them, seen by towers, drawn from codes or latents.

pictures.py reads files and tiles.py cuts large pictures; neither needs jax. siglip.py is the tower
of DeepSeek-VL, VL2 and the Janus models, sigmoid_loss.py what it learns by, sam.py the second tower
of DeepSeek-VL 7B; projector.py leads from a tower's width to the language model's. vq.py turns
pictures into codes and back, vae.py into latents and back, both with autoencoder.py. uvit.py is
between latents and a language model that draws by a flow. eyes.py puts together what a checkpoint
has beside its language model. grounding.py reads what a reply says of places in a picture.
"""

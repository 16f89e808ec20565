"""Pictures: read as the published models read them, seen by towers, drawn from codes.

pictures.py reads files and needs no jax. siglip.py is the tower of DeepSeek-VL, VL2 and the Janus
models, projector.py leads from a tower's width to the language model's, vq.py turns pictures into
codes and back, and eyes.py puts together what a checkpoint has beside its language model.
"""

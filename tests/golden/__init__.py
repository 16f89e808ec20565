"""Reference outputs made once with Hugging Face transformers, and what is needed to make and to
read them.

`cases.py` lists the checkpoints, `checkpoint.py` regenerates their weights from a seed by tensor
name, `make.py` runs transformers on them and writes `<case>.npz` with the outputs only.
"""

"""Checkpoints: read in any form, written, converted and checked.

Reading: load.py opens a Hugging Face folder, a converted folder or a run, and puts its weights into
a model on any mesh. slices.py assembles part of a parameter from the tensors that make it up;
small_weights.py rounds parts to eight or four bits as they are read.

Hugging Face's form: families/ describes each family of models (config.json and tensor names),
hf_config.py and names.py apply it, tensor_files.py reads and writes safetensors, hf_folder.py
checks that config.json and tensors agree.

Conversion: importing.py and exporting.py go from Hugging Face's form to the converted folder and
back, in the folder of staging.py, which appears only when it is complete; recode.py converts
element types, streaming.py bounds memory. weights.py is the format of a converted folder's arrays.

Runs: store.py saves and restores the state of a run through Orbax. manifest.py records the SHA-256
of each file of a checkpoint, fingerprint.py hashes arrays on devices.

Reports: inspection.py says what a checkpoint contains, audit.py what state it is in, shape.py which
model an experiment that begins with one has.

    from dsjax.checkpoint.load import load, open_checkpoint
    model = load("DeepSeek-V2-Lite", mesh=mesh)
    config = open_checkpoint("DeepSeek-V2-Lite").model
"""

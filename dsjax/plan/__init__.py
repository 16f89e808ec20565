"""What a step or a schedule would take, without a TPU: for `tools/plan.py`.

A step on a slice. topology.py parses a slice's name and knows what its chips can do; programs.py
builds the train or decode step of pre-training with the shapes and shardings of its arguments,
posttraining.py those of post-training, and steps.py knows which there are; aot.py compiles one with
the TPU compiler; collectives.py reads what the compiled program sends; operations.py counts the
traced program's FLOPs; estimate.py estimates memory and traffic by arithmetic instead; roofline.py
bounds the step's speed; figures.py puts all of it into one JSON object and prints it.

A pipeline schedule. pipeline.py has its bubble and memory, drawing.py its picture.
"""

"""Element types of the mathematics, and FP8.

policy.py says which type does what on which machine; matmul.py has the products of linear layers
and is the one place that chooses their operands' types; fp8.py quantises arrays block by block, and
hopper_quantize.py does so in kernels for Hopper GPUs; small_weights.py multiplies by weights of
eight or four bits, for inference; e5m6.py packs twelve-bit numbers; activations.py decides in how
many bits the backward pass keeps the inputs of two layers.
"""

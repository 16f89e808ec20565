"""Whether Triton kernels for Hopper GPUs are interpreted here: on such a GPU they run as they are.

There: JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels/test_few_rows.py
"""

from dsjax.kernels.target import Target

INTERPRETED = not Target.here().is_hopper

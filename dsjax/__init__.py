"""dsjax: the DeepSeek family in JAX and Flax, for TPU, GPU and CPU."""

__version__ = "0.1.0"

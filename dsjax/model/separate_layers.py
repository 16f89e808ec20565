"""Layers as arrays of their own, which a CPU decodes from at the rate of its memory.

XLA's CPU compiler copies a layer's matrices out of a stack before it multiplies them. A step of
decoding, whose few tokens use each weight once, then takes longer over the copies than over the
products. Matrices that are arguments of a program are read where they lie.

On a CPU the arrays are views of the stack, which share its memory: they cost nothing to make, and
the stack stays as it is for all else. Matrices of bfloat16 and E4M3 are views of their bits
(`dsjax.precision.float_bits`). A program's size and compile time grow with the layers.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.precision.float_bits import FloatBits, integers_of

AnyModule = TypeVar("AnyModule", bound=nnx.Module)


class SeparateLayers(nnx.Module, Generic[AnyModule]):
    """The layers of a stack, one module each."""

    def __init__(self, stack: AnyModule):
        """
        Args:
          stack: its arrays must be `separable`.
        """
        leaves, structure = jax.tree.flatten(stack)
        cut = zip(*map(_views, leaves), strict=True)
        self.layers = nnx.List([structure.unflatten(list(layer)) for layer in cut])


def separable(tree: nnx.Module) -> bool:
    """Tells whether arrays can have views: those of one CPU device, of whole bytes."""
    return all(
        isinstance(leaf, jax.Array)
        and isinstance(leaf.sharding, jax.sharding.SingleDeviceSharding)
        and next(iter(leaf.devices())).platform == "cpu"
        and jnp.dtype(leaf.dtype).itemsize * 8 == _bits(leaf)
        for leaf in jax.tree.leaves(tree)
    )


def _bits(leaf: jax.Array) -> int:
    kind = jnp.iinfo if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo
    return kind(leaf.dtype).bits


def in_bits(matrix: jax.Array) -> jax.Array | FloatBits:
    """Returns a matrix as what separate layers hold of one, in the same memory."""
    if (integers := integers_of(matrix.dtype)) is None:
        return matrix
    codes = jax.device_put(np.asarray(matrix).view(integers), matrix.sharding)
    return FloatBits(codes, matrix.dtype)


def _views(stack: jax.Array) -> list[jax.Array | FloatBits]:
    """Returns the arrays along the leading dimension, which share the stack's memory; matrices of
    narrow floats in bits.
    """
    # NumPy's views are of the same memory, and JAX takes them as they are.
    if stack.ndim < 3 or (integers := integers_of(stack.dtype)) is None:
        return jax.device_put(list(np.asarray(stack)), stack.sharding)
    codes = jax.device_put(list(np.asarray(stack).view(integers)), stack.sharding)
    return [FloatBits(layer, stack.dtype) for layer in codes]

"""What every part of the model is made of: parameter declaration, stacks, and the small layers.

A module's constructor declares its parameters without making them: each holds a
`jax.ShapeDtypeStruct` plus the names of its dimensions and its initialiser. From that one
declaration follow the abstract tree, the parameter count, the shardings and the initial values
(`dsjax.model.parameters`).

Dimension letters, for the whole package: B batch, T query tokens, S key positions, M tokens (B*T),
D model width, V vocabulary, L layers, N heads, P key-value heads, H query/key head width, R rope
width, W value head width, Q query latent, C key-value latent, F feed-forward width, E routed
experts, K experts a token, G expert groups, A assignments (M*K).
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.parallel.vocabulary_parallel import lookup
from dsjax.precision.activations import swiglu_linear
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy


@dataclasses.dataclass(frozen=True)
class Normal:
    """Gaussian initial values with mean 0."""

    std: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        return self.std * jax.random.normal(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same initial value everywhere."""

    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


# A stack's leading dimension: of the layers that a pipeline cuts into stages, or of those that stay
# at its ends.
LAYER_AXES = ("layers", "end_layers")


class RouterState(nnx.Variable):
    """A router's selection bias: float32 always, outside gradients and optimizer."""


def declare(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: Normal | Constant,
    kind: type[nnx.Variable] = nnx.Param,
) -> nnx.Variable:
    """Declares one float32 parameter: shape, logical name of each dimension, initial values."""
    return kind(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, init=init)


AnyModule = TypeVar("AnyModule", bound=nnx.Module)


def stack(module: AnyModule, count: int, axis: str = "layers") -> AnyModule:
    """Turns a declared module into `count` of them along a leading dimension, to scan over.

    Args:
      axis: logical name of that dimension, one of `LAYER_AXES`.
    """

    def widen(variable: nnx.Variable) -> nnx.Variable:
        metadata = variable.get_metadata()
        shape = variable.get_value().shape
        return declare((count, *shape), (axis, *metadata["axes"]), metadata["init"], type(variable))

    return jax.tree.map(widen, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last dimension, in float32; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight = jnp.broadcast_to(weight.astype(jnp.float32), x.shape)
    return (normed * weight).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, eps: float):
        self.weight = declare((dim,), ("norm",), Constant(1.0))
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


class FeedForward(nnx.Module):
    """SwiGLU feed-forward layer: the dense layers' and the shared experts'."""

    def __init__(self, dim: int, hidden: int, init_std: float, policy: Policy):
        init = Normal(init_std)
        self.w_gate = declare((dim, hidden), ("embed", "ffn"), init)
        self.w_up = declare((dim, hidden), ("embed", "ffn"), init)
        self.w_down = declare((hidden, dim), ("ffn", "embed"), init)
        self.policy = policy

    @jax.named_scope("feed-forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = (linear(x, w[...], self.policy) for w in (self.w_gate, self.w_up))
        return swiglu_linear(gate, up, self.w_down[...], self.policy)


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, dim: int, init_std: float, policy: Policy):
        self.weight = declare((vocab_size, dim), ("vocab", "embed"), Normal(init_std))
        self.policy = policy

    @jax.named_scope("embedding")
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D] in the compute type; an id outside the vocabulary gives NaN."""
        return lookup(self.weight[...], tokens_BT).astype(self.policy.compute)


class Head(nnx.Module):
    """Projection onto the vocabulary; never low precision beyond the compute type, logits in
    float32.
    """

    def __init__(self, dim: int, vocab_size: int, init_std: float):
        self.weight = declare((dim, vocab_size), ("embed", "vocab"), Normal(init_std))

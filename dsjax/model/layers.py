"""Building blocks of the model: parameter declarations, stacks of layers, and small layers.

A module's constructor declares its parameters without creating them: each holds a
`jax.ShapeDtypeStruct`, the logical names of its dimensions and its initialiser. The abstract tree,
the parameter count, the shardings and the initial values all derive from that one declaration
(`dsjax.model.parameters`).

Dimension letters of the whole package: B batch, T query tokens, S key positions, M tokens (B*T),
D model width, V vocabulary, L layers, N heads, P key-value heads, H query/key head width, R rope
width, W value head width, Q query latent, C key-value latent, F feed-forward width, E routed
experts, K experts per token, G expert groups, A assignments (M*K). Of an indexer: I heads, Y their
width, J keys that a query attends to.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.kernels import few_rows
from dsjax.parallel.vocabulary_parallel import lookup
from dsjax.precision.activations import limited, swiglu, swiglu_linear
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
    """One initial value for all elements."""

    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


# Logical names of a stack's leading dimension: "layers" are cut into a pipeline's stages,
# "end_layers" run at its ends.
LAYER_AXES = ("layers", "end_layers")


class RouterState(nnx.Variable):
    """A router's selection bias: always float32, without gradient or optimizer state."""


class Float32(nnx.Param):
    """A parameter that is float32 in every model, whatever the type of the others."""


def stays_float32(variable: nnx.Variable) -> bool:
    """Tells whether a variable is float32 in every model."""
    return isinstance(variable, RouterState | Float32)


def declare(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: Normal | Constant,
    kind: type[nnx.Variable] = nnx.Param,
) -> nnx.Variable:
    """Declares a float32 parameter by shape, logical name of each dimension, and initialiser."""
    return kind(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, init=init)


AnyModule = TypeVar("AnyModule", bound=nnx.Module)


def stack(module: AnyModule, count: int, axis: str = "layers") -> AnyModule:
    """Adds a leading dimension of size `count` to all parameters of a declared module.

    Args:
      axis: the dimension's logical name, one of `LAYER_AXES`.
    """

    def widen(variable: nnx.Variable) -> nnx.Variable:
        metadata = variable.get_metadata()
        shape = variable.get_value().shape
        return declare((count, *shape), (axis, *metadata["axes"]), metadata["init"], type(variable))

    return jax.tree.map(widen, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalises the last dimension by its root mean square, in float32; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight = jnp.broadcast_to(weight.astype(jnp.float32), x.shape)
    return (normed * weight).astype(x.dtype)


def _rms_norm_backward(
    eps: float, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(partial(rms_norm, eps=eps), *residuals)[1](dy)


# Of the same values and gradients. Its backward pass keeps x alone and computes the rest again,
# where autodiff keeps four float32 arrays of x's shape.
rms_norm_of_kept_input = jax.custom_vjp(rms_norm, nondiff_argnums=(2,))
rms_norm_of_kept_input.defvjp(
    lambda x, weight, eps: (rms_norm(x, weight, eps), (x, weight)), _rms_norm_backward
)


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, eps: float, policy: Policy | None = None):
        """
        Args:
          policy: of the model; for a GPU the backward pass keeps the input alone.
        """
        self.weight = declare((dim,), ("norm",), Constant(1.0))
        self.eps = eps
        self.keeps_input = policy is not None and policy.target.kind == "gpu"

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = rms_norm_of_kept_input if self.keeps_input else rms_norm
        return norm(x, self.weight[...], self.eps)


class LayerNorm(nnx.Module):
    """Normalises the last dimension to mean 0 and variance 1, in float32; returns x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6):
        self.weight = declare((dim,), ("norm",), Constant(1.0), Float32)
        self.bias = declare((dim,), ("norm",), Constant(0.0), Float32)
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - x32.mean(axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        weight, bias = (jnp.broadcast_to(v[...], x.shape) for v in (self.weight, self.bias))
        return (x32 * weight + bias).astype(x.dtype)


class FeedForward(nnx.Module):
    """SwiGLU feed-forward layer, of dense layers and of shared experts."""

    def __init__(self, dim: int, hidden: int, init_std: float, policy: Policy, limit: float = 0.0):
        init = Normal(init_std)
        self.w_gate = declare((dim, hidden), ("embed", "ffn"), init)
        self.w_up = declare((dim, hidden), ("embed", "ffn"), init)
        self.w_down = declare((hidden, dim), ("ffn", "embed"), init)
        self.policy = policy
        self.limit = limit

    @jax.named_scope("feed-forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = (linear(x, w[...], self.policy) for w in (self.w_gate, self.w_up))
        return swiglu_linear(*limited(gate, up, self.limit), self.w_down[...], self.policy)

    def steps(self, x_BTD: jax.Array) -> bool:
        """Tells whether `step` takes these tokens, here.

        Must be called on the stack of all layers.
        """
        matrices = [w[...] for w in (self.w_gate, self.w_up, self.w_down)]
        n_tokens = x_BTD.shape[0] * x_BTD.shape[1]
        return self.policy.fp8 is None and few_rows.fits(
            n_tokens, matrices, x_BTD.dtype, self.policy.target
        )

    @jax.named_scope("feed-forward")
    def step(self, x_BTD: jax.Array, norm: RMSNorm, layer: jax.Array) -> jax.Array:
        """Does what is left of a layer after its attention, in two kernels that read the layer's
        weights where they lie. Returns the residual.

        Must be called on the stack of all layers.

        Args:
          x_BTD: the residual after attention.
          norm: the layers' norms before this.
        """
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        multiprocessors = self.policy.target.multiprocessors
        hidden_MF = few_rows.few_row_swiglu(
            x_MD,
            self.w_gate[...],
            self.w_up[...],
            layer,
            few_rows.Norm(norm.weight[...], norm.eps),
            lambda gate, up: swiglu(*limited(gate, up, self.limit)),
            multiprocessors=multiprocessors,
        )
        (y_MD,) = few_rows.few_row_products(
            hidden_MF, [self.w_down[...]], layer, residual_MF=x_MD, multiprocessors=multiprocessors
        )
        return y_MD.reshape(x_BTD.shape)


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, dim: int, init_std: float, policy: Policy):
        self.weight = declare((vocab_size, dim), ("vocab", "embed"), Normal(init_std))
        self.policy = policy

    @jax.named_scope("embedding")
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Looks up int32 [B, T] as [B, T, D] in the compute type; NaN for ids outside the
        vocabulary.
        """
        # The bits of an id outside the vocabulary are all ones, which is NaN too.
        rows = jax.tree.map(lambda leaf: lookup(leaf, tokens_BT), self.weight[...])
        return rows.astype(self.policy.compute)


class Head(nnx.Module):
    """Projection onto the vocabulary: never FP8, and its logits are float32."""

    def __init__(self, dim: int, vocab_size: int, init_std: float):
        self.weight = declare((dim, vocab_size), ("embed", "vocab"), Normal(init_std))

"""Manifold-constrained hyper-connections (mHC): several residual streams instead of one.

A layer reads a weighted sum of the streams. Its output is added to each of them, weighted again,
and the streams themselves are mixed by a matrix. All weights depend on the token: they are a linear
map of its streams, flattened and normalised. Weights and mixing are float32.

The matrix is made doubly stochastic, so that mixing neither grows nor shrinks the streams over many
layers: rows and columns are divided by their sums in turn (Sinkhorn-Knopp).

Letter besides the package's: X residual streams.

Defined by DeepSeek-V4 as transformers 5.24 computes it; mHC (2026), V4 report section 2.2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.model.layers import Constant, Float32, Normal, declare
from dsjax.precision.matmul import float32_matmul


class Mix(NamedTuple):
    """How a layer is connected to the streams, float32."""

    into_BTX: jax.Array  # weight of each stream in the layer's input
    out_BTX: jax.Array  # weight of the layer's output in each stream
    across_BTXX: jax.Array  # [from, to]: how much of each stream goes on in each


def sinkhorn(positive_BTXX: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Divides columns by their sums, and then rows and columns in turn; `eps` is added to sums."""

    def divided(x: jax.Array, axis: int) -> jax.Array:
        return x / (x.sum(axis=axis, keepdims=True) + eps)

    def both(_: jax.Array | int, x: jax.Array) -> jax.Array:
        return divided(divided(x, -1), -2)

    return jax.lax.fori_loop(0, iterations - 1, both, divided(positive_BTXX, -2))


def collapse(streams_BTXD: jax.Array, into_BTX: jax.Array) -> jax.Array:
    """Sums the streams by weight: [B, T, D] in their dtype."""
    summed_BTD = jnp.einsum("BTXD,BTX->BTD", streams_BTXD.astype(jnp.float32), into_BTX)
    return summed_BTD.astype(streams_BTXD.dtype)


def expand(streams_BTXD: jax.Array, out_BTD: jax.Array, mix: Mix) -> jax.Array:
    """Mixes the streams and adds a layer's output to each: [B, T, X, D] in their dtype."""
    streams, out = streams_BTXD.astype(jnp.float32), out_BTD.astype(jnp.float32)
    mixed_BTXD = jnp.einsum("BTYX,BTYD->BTXD", mix.across_BTXX, streams)
    return (mixed_BTXD + mix.out_BTX[..., None] * out[:, :, None]).astype(streams_BTXD.dtype)


class HyperConnection(nnx.Module):
    """Connects one half of a layer, attention or experts, to the streams."""

    def __init__(self, config: ModelConfig):
        X = config.hc_mult
        self.fn = _map(config, (2 + X) * X)
        self.base = declare(((2 + X) * X,), ("norm",), Constant(0.0), Float32)
        self.scale = declare((3,), ("norm",), Constant(1.0), Float32)
        self.config = config

    @jax.named_scope("hyper-connection")
    def __call__(self, streams_BTXD: jax.Array) -> tuple[jax.Array, Mix]:
        """Returns the layer's input, [B, T, D], and how its output is joined."""
        X, eps = self.config.hc_mult, self.config.hc_eps
        numbers = jnp.split(_mapped(streams_BTXD, self.fn[...], self.config), [X, 2 * X], axis=-1)
        bases = jnp.split(self.base[...], [X, 2 * X])
        scales = self.scale[...]
        into, out, across = (
            numbers[i] * scales[i] + bases[i][None, None] for i in range(len(bases))
        )
        across_BTXX = jax.nn.softmax(across.reshape(*across.shape[:2], X, X), axis=-1) + eps
        mix = Mix(
            jax.nn.sigmoid(into) + eps,
            2 * jax.nn.sigmoid(out),
            sinkhorn(across_BTXX, self.config.hc_sinkhorn_iters, eps),
        )
        return collapse(streams_BTXD, mix.into_BTX), mix


class HyperHead(nnx.Module):
    """Sums the streams after the last layer."""

    def __init__(self, config: ModelConfig):
        self.fn = _map(config, config.hc_mult)
        self.base = declare((config.hc_mult,), ("norm",), Constant(0.0), Float32)
        self.scale = declare((1,), ("norm",), Constant(1.0), Float32)
        self.config = config

    def __call__(self, streams_BTXD: jax.Array) -> jax.Array:
        """Returns [B, T, D]."""
        numbers = _mapped(streams_BTXD, self.fn[...], self.config)
        into = numbers * self.scale[...][None, None] + self.base[...][None, None]
        return collapse(streams_BTXD, jax.nn.sigmoid(into) + self.config.hc_eps)


def _map(config: ModelConfig, numbers: int) -> nnx.Variable:
    shape = (config.hc_mult * config.dim, numbers)
    return declare(shape, ("router_embed", "norm"), Normal(config.init_std), Float32)


def _mapped(streams_BTXD: jax.Array, fn: jax.Array, config: ModelConfig) -> jax.Array:
    """Maps the normalised streams of each token to numbers, float32 [B, T, numbers]."""
    flat = streams_BTXD.reshape(*streams_BTXD.shape[:2], -1).astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(flat), axis=-1, keepdims=True)
    return float32_matmul(flat * jax.lax.rsqrt(mean_square + config.norm_eps), fn)

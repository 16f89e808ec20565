"""Linear layers with GELU in between: from one width to another."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.model.layers import Constant, Normal, declare
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy

STD = 0.02  # of initial values, as Janus' and SigLIP's


def gelu(x: jax.Array, *, exact: bool = True) -> jax.Array:
    """Applies GELU in float32; returns x's dtype."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=not exact).astype(x.dtype)


class Linear(nnx.Module):
    """A linear layer with a bias."""

    def __init__(self, axes: tuple[str, str], shape: tuple[int, int], policy: Policy):
        self.weight = declare(shape, axes, Normal(STD))
        bias_axis = "norm" if axes[1] == "embed" else axes[1]
        self.bias = declare(shape[1:], (bias_axis,), Constant(0.0))
        self.policy = policy

    def __call__(self, x: jax.Array) -> jax.Array:
        y = linear(x, self.weight[...], self.policy)
        return y + jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)


def unfold(x_BTD: jax.Array, size: int) -> jax.Array:
    """Joins the features of every size x size patches, the order is [channel, row, column].

    Paper: DeepSeek-VL2 (arXiv:2412.10302), section 2.2: a pixel shuffle. A grid that does not
    divide gets zeros at the right and the bottom.

    Returns:
      [B, patches / size^2, D * size^2], row by row.
    """
    B, T, D = x_BTD.shape
    grid = math.isqrt(T)
    more = -grid % size
    x_BYXD = jnp.pad(x_BTD.reshape(B, grid, grid, D), ((0, 0), (0, more), (0, more), (0, 0)))
    side = (grid + more) // size
    squares = x_BYXD.reshape(B, side, size, side, size, D).transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(B, side * side, D * size * size)


class Projector(nnx.Module):
    """Janus' aligners: a layer to the new width, then, each after a GELU, layers that keep it."""

    def __init__(self, dim_in: int, dim: int, depth: int, policy: Policy, *, exact: bool = True):
        self.layers = nnx.List(
            Linear(("latent", "embed"), (dim_in if first else dim, dim), policy)
            for first in (True, *[False] * (depth - 1))
        )
        self.exact = exact  # of GELU

    @jax.named_scope("projector")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., width in] to [..., width]."""
        for place, layer in enumerate(self.layers):
            x = layer(gelu(x, exact=self.exact) if place else x)
        return x


class HybridProjector(nnx.Module):
    """DeepSeek-VL 7B's aligner: each tower gives half of the width, the high one the first."""

    def __init__(self, dim_low: int, dim_high: int, dim: int, policy: Policy):
        self.high = Linear(("latent", "embed"), (dim_high, dim // 2), policy)
        self.low = Linear(("latent", "embed"), (dim_low, dim // 2), policy)
        self.out = Linear(("latent", "embed"), (dim, dim), policy)

    @jax.named_scope("projector")
    def __call__(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """Maps [..., width of a tower] of both to [..., width]."""
        return self.out(gelu(jnp.concatenate([self.high(high), self.low(low)], axis=-1)))


class CodeHead(nnx.Module):
    """Predicts codes from the language model's hidden states."""

    def __init__(self, dim: int, hidden: int, n_codes: int, policy: Policy):
        self.project = Linear(("embed", "latent"), (dim, hidden), policy)
        self.vision_head = Linear(("embed", "vocab"), (hidden, n_codes), policy)

    @jax.named_scope("code-head")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits, float32 [..., codes]."""
        return self.vision_head(gelu(self.project(x))).astype(jnp.float32)

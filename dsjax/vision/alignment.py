"""What is to be seen of a picture in the hidden states of its drawing (JanusFlow,
arXiv:2411.07975v2, section 3.4, equation 8).

While JanusFlow learns to draw, a small network projects the states of an inner layer to the width
of the tower, and learns with the language model to find the features that the tower has of the
picture itself. No model has the network once it is trained. The paper gives it three layers and
neither their width nor what is between them: both are REPA's (arXiv:2410.06940), SiLU and, in
JanusFlow, 2048, which is also the width of its language model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.precision.policy import Policy
from dsjax.vision.projector import Linear

_TINY = 1e-12  # added to the square of a length, so that the gradient at 0 is finite


class Alignment(nnx.Module):
    """Projects the language model's states to the width of the tower: three linear layers."""

    def __init__(self, dim: int, tower_dim: int, policy: Policy):
        self.layers = nnx.List(
            Linear(axes, (dim, width), policy)
            for axes, width in (
                (("latent", "embed"), dim),
                (("latent", "embed"), dim),
                (("embed", "latent"), tower_dim),
            )
        )

    @jax.named_scope("alignment")
    def __call__(self, states: jax.Array) -> jax.Array:
        """Maps [..., width] to [..., width of the tower]."""
        for place, layer in enumerate(self.layers):
            if place:
                states = jax.nn.silu(states.astype(jnp.float32)).astype(states.dtype)
            states = layer(states)
        return states


def cosine(one: jax.Array, other: jax.Array) -> jax.Array:
    """Returns the cosines of the angles between vectors [..., W], float32 [...]."""

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + _TINY)

    return (unit(one) * unit(other)).sum(axis=-1)

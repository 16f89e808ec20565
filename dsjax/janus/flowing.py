"""What a model that draws by a flow learns from a drawing (JanusFlow, arXiv:2411.07975, section 3).

Between noise z0 and a picture's latents x lies z_t = t x + (1 - t) z0. The model is given z_t and
the time t, of 0 to 1, and predicts the velocity x - z0; the loss is the squared error. Times are
the logistic function of a standard normal number: logit-normal. The paper gives no parameters;
these are the defaults of arXiv:2403.03206, which it cites. Latents, noise and time of a drawing
follow from one number, so that a run that was stopped goes on with the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.config.vision import PATCH
from dsjax.parallel.sharding import constrain, divisible
from dsjax.vision.alignment import Alignment, cosine
from dsjax.vision.eyes import Brush, Noisy


class Drawings(NamedTuple):
    """The drawings of rows, of which some may have fewer than N."""

    latents: jax.Array  # float32 [..., B, N, 2, rows, columns, channels], means and deviations
    seeds: jax.Array  # uint32 [..., B, N], what latents, noise and time are drawn with
    starts: jax.Array  # int32 [..., B, N], the position of the time in the row; -1: no drawing

    @property
    def n_positions(self) -> int:
        """Positions of the language model that the latents of a drawing take."""
        rows, columns, _ = self.latents.shape[-3:]
        return rows // PATCH * (columns // PATCH)

    @property
    def counted(self) -> jax.Array:
        """Positions whose velocity is predicted, float32 [..., B]."""
        return (self.starts >= 0).astype(jnp.float32).sum(axis=-1) * self.n_positions


class Way(NamedTuple):
    """Places on the way from noise to pictures."""

    latents_BYXC: jax.Array
    time_B: jax.Array
    velocity_BYXC: jax.Array


def way_of(drawings: Drawings) -> Way:
    """Returns where the drawings of a micro-batch are: those of its first row, the second, ..., and
    as many others as these lack to divide over the mesh.
    """

    def one(latents: jax.Array, seed: jax.Array) -> Way:
        mean, deviation = latents
        of_latents, of_noise, of_time = jax.random.split(jax.random.key(seed), 3)
        picture = mean + deviation * jax.random.normal(of_latents, mean.shape)
        noise = jax.random.normal(of_noise, mean.shape)
        time = jax.nn.sigmoid(jax.random.normal(of_time))
        return Way(time * picture + (1 - time) * noise, time, picture - noise)

    latents = drawings.latents.reshape(-1, *drawings.latents.shape[2:])
    way = jax.vmap(one)(divisible(latents), divisible(drawings.seeds.reshape(-1)))
    spread = ("batch", "tokens", "tokens", "width")
    return Way(constrain(way.latents_BYXC, *spread), way.time_B, way.velocity_BYXC)


class Begun(NamedTuple):
    """Drawings before the language model has seen them."""

    noisy: Noisy
    velocity_BYXC: jax.Array  # to predict


def begin(brush: Brush, drawings: Drawings) -> tuple[jax.Array, Begun]:
    """Returns the language model's inputs: of each drawing its time, then its latents row by row;
    and what `squared_error` needs, so that the first U-ViT has one backward pass.

    Returns:
      [B, N * (1 + positions), D].
    """
    way = way_of(drawings)
    noisy = brush.read(way.latents_BYXC, way.time_B)
    B, N = drawings.starts.shape
    inputs_BXD = noisy.inputs_BTD[: B * N].reshape(B, -1, noisy.inputs_BTD.shape[-1])
    return inputs_BXD, Begun(noisy, way.velocity_BYXC)


def squared_error(
    brush: Brush, hidden_BTD: jax.Array, drawings: Drawings, begun: Begun
) -> jax.Array:
    """Sums the mean squared error of each position's velocity over all positions, float32.

    Args:
      hidden_BTD: the language model's final states of whole rows.
    """
    velocity_BYXC = brush.velocity(_states(hidden_BTD, drawings), begun.noisy)
    error_B = jnp.square(velocity_BYXC - begun.velocity_BYXC).mean(axis=(1, 2, 3))
    return drawings.n_positions * _sum(error_B, drawings)


def misalignment(
    alignment: Alignment, inner_BTD: jax.Array, seen_BTD: jax.Array, drawings: Drawings
) -> jax.Array:
    """Sums, over all positions, the negative cosine of what is projected of a position's state and
    of what the tower sees there, float32 (section 3.4, equation 8).

    Args:
      inner_BTD: the states of whole rows after an inner layer.
      seen_BTD: the tower's features of the pictures that are drawn, those of the first row, the
        second, ..., and as many others as these lack to divide over the mesh.
    """
    found_BT = cosine(alignment(_states(inner_BTD, drawings)), seen_BTD)
    return -_sum(found_BT.sum(axis=-1), drawings)


def _states(hidden_BTD: jax.Array, drawings: Drawings) -> jax.Array:
    """Returns the states of each drawing's latents, in the order of `way_of`, [drawings, T, D]."""
    B, N = drawings.starts.shape
    n, D = drawings.n_positions, hidden_BTD.shape[-1]
    places = jnp.maximum(drawings.starts, 0)[..., None] + jnp.arange(1, n + 1)[None, None]
    states = jnp.take_along_axis(hidden_BTD, places.reshape(B, N * n, 1), axis=1)
    return divisible(states.reshape(B * N, n, D))


def _sum(of_each: jax.Array, drawings: Drawings) -> jax.Array:
    """Sums what each drawing has, in the order of `way_of`."""
    starts = drawings.starts.reshape(-1)
    # Selected, not multiplied: where nothing is drawn, a loss may be infinite.
    return jnp.where(starts >= 0, of_each[: len(starts)], 0.0).sum()

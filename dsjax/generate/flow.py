"""Draws by a rectified flow: noise moves along a velocity until it is a picture (JanusFlow,
arXiv:2411.07975, section 3.1).

A step runs the time and all positions of the noisy picture through the language model, behind the
prompt, and adds velocity / steps (Euler's method). Every picture has two rows: one sees the prompt,
the other its first token alone. Latents move with guidance * c - (guidance - 1) * u, of the
velocities of the two. As in DeepSeek's code the second row's places are those of the first: what it
does not see keeps its place in the order, but neither runs nor is cached.

The prompt runs once, before the first step: what it leaves in the cache serves both rows of every
picture, since a first token sees nothing but itself. Each step writes the picture's own entries
over those of the step before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsjax.config.vision import PATCH
from dsjax.generate.prompts import MIN_CHUNK
from dsjax.generate.shapes import power_of_two
from dsjax.model.cache import Cache, empty_cache
from dsjax.model.transformer import Embeddings, Transformer
from dsjax.parallel.sharding import constrain, parts
from dsjax.vision.eyes import Brush
from dsjax.vision.vae import Vae


class Painted(NamedTuple):
    """Pictures under way; the rows of the cache are all that see the prompt, then all others."""

    cache: Cache
    latents_XYXC: jax.Array  # float32


class Painter:
    """Draws pictures of `grid` x `grid` positions of the language model."""

    def __init__(
        self, language: Transformer, brush: Brush, vae: Vae, grid: int, mesh: Mesh | None = None
    ) -> None:
        self._language, self._brush, self._vae, self._mesh = language, brush, vae, mesh
        self._grid, self._n_parts = grid, parts("batch", mesh) if mesh else 1
        self._start = jax.jit(functools.partial(_start, room=grid * grid + 1))
        self._step = jax.jit(_step, donate_argnums=2)
        self._noise = jax.jit(jax.vmap(self._noise_of))
        self._decode = jax.jit(lambda vae, latents_BYXC: vae.decode(latents_BYXC))

    def noise(self, seeds: Sequence[int]) -> np.ndarray:
        """Returns the latents that pictures begin as, float32 [n, rows, columns, channels]."""
        return np.asarray(self._noise(np.asarray(seeds, np.uint32)))

    def _noise_of(self, seed: jax.Array) -> jax.Array:
        side = self._grid * PATCH
        shape = (side, side, self._brush.config.latent_channels)
        return jax.random.normal(jax.random.key(seed), shape)

    def latents(
        self,
        prompt: Sequence[int],
        noise_XYXC: np.ndarray,
        *,
        guidance: float,
        steps: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> np.ndarray:
        """Moves noise to the latents of pictures, float32 in its shape.

        Args:
          prompt: up to the token that begins a picture, whose place the time takes.
          guidance: 1 follows the prompt's row alone, which is all that runs then.
          progress: called with the steps that are done and all steps.
        """
        n, each = len(noise_XYXC), 1 if guidance == 1 else 2
        # As many rows as divide over the mesh.
        n_rows = n + -n % self._n_parts
        noise_XYXC = np.concatenate([noise_XYXC, np.repeat(noise_XYXC[:1], n_rows - n, axis=0)])
        length = len(prompt) - 1
        tokens_BT = np.zeros((self._n_parts, max(power_of_two(length), MIN_CHUNK)), np.int32)
        tokens_BT[:, :length] = prompt[:-1]
        starts_B = np.repeat(np.array([length, 1][:each], np.int32), n_rows)
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
            cache = self._start(self._language, tokens_BT, starts_B)
            painted = Painted(cache, jnp.asarray(noise_XYXC))
            for step in range(steps):
                progress(step, steps)
                painted = self._step(
                    self._language,
                    self._brush,
                    painted,
                    starts_B,
                    np.int32(length),
                    np.float32(step / steps),
                    np.float32(1 / steps),
                    np.float32(guidance),
                )
            found = np.asarray(painted.latents_XYXC)[:n]
        progress(steps, steps)
        return found

    def pixels(self, latents_XYXC: np.ndarray) -> np.ndarray:
        """Decodes latents: uint8 [n, size, size, 3], cut to whole numbers as in DeepSeek's code."""
        return ((self.decoded(latents_XYXC).clip(-1, 1) + 1) / 2 * 255).astype(np.uint8)

    def decoded(self, latents_XYXC: np.ndarray) -> np.ndarray:
        """Decodes latents: float32 [n, size, size, 3], about -1 to 1. The VAE's activations are
        large, so it decodes one picture per device at a time.
        """
        decoded = []
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
            for first in range(0, len(latents_XYXC), self._n_parts):
                some = latents_XYXC[first : first + self._n_parts]
                lacking = np.repeat(some[:1], self._n_parts - len(some), axis=0)
                found = self._decode(self._vae, np.concatenate([some, lacking]))
                decoded.append(np.asarray(found)[: len(some)])
        return np.concatenate(decoded)


def _start(language: Transformer, tokens_BT: jax.Array, starts_B: jax.Array, *, room: int) -> Cache:
    """Runs a prompt, and copies what it leaves to the rows of pictures.

    Args:
      tokens_BT: int32, equal rows, padded behind the prompt.
      starts_B: int32, one per row of the result.
      room: tokens that will follow.
    """
    config, dtype = language.config, language.policy.compute
    B, T = tokens_BT.shape
    short = empty_cache(config, B, T, dtype).pinned()
    extended = language.extend(tokens_BT, jnp.zeros(B, jnp.int32), short)
    n_rows = len(starts_B)
    cache = empty_cache(config, n_rows, T + room, dtype).pinned()
    every_B = jnp.arange(n_rows, dtype=jnp.int32)
    return cache.insert(every_B, extended.cache, jnp.zeros_like(every_B)).pinned()


def _step(
    language: Transformer,
    brush: Brush,
    painted: Painted,
    starts_B: jax.Array,
    length: jax.Array,
    time: jax.Array,
    span: jax.Array,
    guidance: jax.Array,
) -> Painted:
    """Moves latents for a span of time.

    Args:
      starts_B: int32, how many tokens each row sees before the picture.
      length: int32 scalar, how many the prompt has there.
    """
    latents_XYXC = painted.latents_XYXC
    n, B = len(latents_XYXC), len(starts_B)
    noisy = brush.read(latents_XYXC, jnp.full(n, time))
    noisy = jax.tree.map(lambda x: jnp.tile(x, (B // n, *[1] * (x.ndim - 1))), noisy)
    given_BT = jnp.ones(noisy.inputs_BTD.shape[:2], bool)
    extended = language.extend(
        jnp.zeros(given_BT.shape, jnp.int32),
        starts_B,
        painted.cache,
        embeddings=Embeddings(given_BT, noisy.inputs_BTD),
        skipped_B=length - starts_B,
    )
    velocity_BYXC = brush.velocity(extended.main_BTD[:, 1:], noisy)
    velocity_XYXC = velocity_BYXC[:n]
    if B > n:
        velocity_XYXC = guidance * velocity_XYXC - (guidance - 1) * velocity_BYXC[n:]
    moved = constrain(latents_XYXC + span * velocity_XYXC, "batch", "tokens", "tokens", "width")
    return Painted(extended.cache.pinned(), moved)

"""Draws: a language model predicts the codes of a picture one after the other, with guidance.

Every picture has two rows: one continues the prompt, the other the same prompt with its text
blanked out. Codes are drawn from u + guidance * (c - u), the logits of the two (classifier-free
guidance, arXiv:2207.12598; Janus, arXiv:2410.13848, section 3.3), and both rows go on with the same
code. The prompt runs once, and what it leaves in the cache is copied for every picture.
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

from dsjax.generate.prompts import MIN_CHUNK
from dsjax.generate.sampling import Knobs, Sampling, knobs, sample
from dsjax.generate.shapes import power_of_two
from dsjax.model.cache import Cache, empty_cache
from dsjax.model.transformer import Embeddings, Transformer
from dsjax.parallel.sharding import constrain, parts
from dsjax.vision.eyes import Pencil


class Drawn(NamedTuple):
    """Pictures under way; the rows are all with the prompt, then all with the blank one."""

    cache: Cache
    hidden_BD: jax.Array  # of each row's newest token
    position: jax.Array  # int32 scalar, of the next token


class Drawer:
    """Draws pictures of `grid` x `grid` codes, row by row."""

    def __init__(
        self, language: Transformer, pencil: Pencil, grid: int, mesh: Mesh | None = None
    ) -> None:
        self._language = language.for_decoding()
        self._pencil, self._grid, self._mesh = pencil, grid, mesh
        self._n_parts = parts("batch", mesh) if mesh else 1
        self._start = jax.jit(functools.partial(_start, room=grid * grid))
        self._row = jax.jit(functools.partial(_row, n_codes=grid), donate_argnums=2)
        self._decode = jax.jit(lambda pencil, codes_BYX: pencil.vq.decode(codes_BYX))

    def codes(
        self,
        prompt: Sequence[int],
        blank: Sequence[int],
        samplings: Sequence[Sampling],
        *,
        guidance: float,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> np.ndarray:
        """Draws the codes of one picture per sampling, int32 [pictures, grid, grid].

        Args:
          prompt: up to the token that begins a picture.
          blank: as long, the text blanked out.
          guidance: 1 follows the prompt's row alone, which is all that runs then.
          progress: called with the rows that are done and all rows.
        """
        assert len(prompt) == len(blank), "one position of a picture cannot be two"
        n = len(samplings)
        each = 1 if guidance == 1 else 2
        # As many rows as divide over the mesh.
        n_rows = n + -n % self._n_parts
        drawn_by = knobs([*samplings, *[samplings[0]] * (n_rows - n)])
        width = max(power_of_two(len(prompt)), MIN_CHUNK)
        texts = ([prompt, blank] if each == 2 else [prompt]) * self._n_parts
        tokens_BT = np.zeros((len(texts), width), np.int32)
        tokens_BT[:, : len(prompt)] = texts
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
            rows_B = np.repeat(np.arange(each, dtype=np.int32), n_rows)
            drawn = self._start(self._language, tokens_BT, np.int32(len(prompt)), rows_B)
            rows = []
            for done in range(self._grid):
                progress(done, self._grid)
                drawn, codes_BX = self._row(
                    self._language, self._pencil, drawn, drawn_by, np.float32(guidance)
                )
                rows.append(np.asarray(codes_BX)[:n])
            progress(self._grid, self._grid)
        return np.stack(rows, axis=1)

    def pixels(self, codes_BYX: np.ndarray) -> np.ndarray:
        """Decodes codes, int32 [n, grid, grid]: uint8 [n, size, size, 3], cut to whole numbers as
        in Janus' code.
        """
        return np.clip((self.decoded(codes_BYX) + 1) / 2 * 255, 0, 255).astype(np.uint8)

    def decoded(self, codes_BYX: np.ndarray) -> np.ndarray:
        """Decodes codes, int32 [n, grid, grid]: float32 [n, size, size, 3], about -1 to 1."""
        n = len(codes_BYX)
        padded = np.concatenate([codes_BYX, np.repeat(codes_BYX[:1], -n % self._n_parts, axis=0)])
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
            return np.asarray(self._decode(self._pencil, padded)[:n])


def _start(
    language: Transformer, tokens_BT: jax.Array, length: jax.Array, rows_B: jax.Array, *, room: int
) -> Drawn:
    """Runs prompts, and copies them to the rows of pictures.

    Args:
      tokens_BT: int32, padded behind the prompts.
      length: int32 scalar, the prompts' own.
      rows_B: int32, the prompt of each row.
      room: tokens that will follow.
    """
    config, dtype, separate = language.config, language.policy.compute, language.separate
    B, T = tokens_BT.shape
    short = empty_cache(config, B, T, dtype, separate=separate).pinned()
    extended = language.extend(tokens_BT, jnp.zeros(B, jnp.int32), short)
    last_BD = jax.lax.dynamic_index_in_dim(extended.main_BTD, length - 1, axis=1, keepdims=False)
    cache = empty_cache(config, len(rows_B), T + room, dtype, separate=separate).pinned()
    every_B = jnp.arange(len(rows_B), dtype=jnp.int32)
    cache = cache.insert(every_B, extended.cache, rows_B).pinned()
    return Drawn(cache, constrain(last_BD[rows_B], "batch", "width"), length.astype(jnp.int32))


def _row(
    language: Transformer,
    pencil: Pencil,
    drawn: Drawn,
    drawn_by: Knobs,
    guidance: jax.Array,
    *,
    n_codes: int,
) -> tuple[Drawn, jax.Array]:
    """Draws the next codes of all pictures, int32 [pictures, n_codes]."""
    n, B = len(drawn_by.temperature_B), len(drawn.hidden_BD)

    def step(drawn: Drawn, _: None) -> tuple[Drawn, jax.Array]:
        logits_BV = pencil.head(drawn.hidden_BD)
        guided_XV = logits_BV[:n]
        if B > n:
            guided_XV = logits_BV[n:] + guidance * (guided_XV - logits_BV[n:])
        codes_X = sample(guided_XV, drawn_by, jnp.full(n, drawn.position))
        inputs_BD = jnp.tile(pencil.embeddings(codes_X), (B // n, 1))
        extended = language.extend(
            jnp.zeros((B, 1), jnp.int32),
            jnp.full(B, drawn.position),
            drawn.cache,
            embeddings=Embeddings(jnp.ones((B, 1), bool), inputs_BD[:, None]),
        )
        hidden_BD = constrain(extended.main_BTD[:, 0], "batch", "width")
        return Drawn(extended.cache.pinned(), hidden_BD, drawn.position + 1), codes_X

    drawn, codes_SX = jax.lax.scan(step, drawn, length=n_codes)
    return drawn, codes_SX.T

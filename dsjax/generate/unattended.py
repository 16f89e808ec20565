"""Decoding steps that ask nothing of the host and take every row's most likely token.

A GPU decodes so while all rows are greedy. Starting a kernel takes longer there than what most of
those between two steps do, so a step only lets rows advance and notes their tokens, from which all
that is reported follows afterwards.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.generate.record import NOTHING, Wanted
from dsjax.generate.sampling import Knobs
from dsjax.model.cache import Cache
from dsjax.model.transformer import Transformer


class Rows(NamedTuple):
    """The state of a batch's rows, int32 each."""

    position_B: jax.Array  # of the newest token, which no layer has processed
    token_B: jax.Array  # the newest
    left_B: jax.Array  # how many tokens a row may still add


def reports_enough(model: Transformer, knobs: Knobs, wanted: Wanted) -> bool:
    """Tells whether tokens are all that `run` must report, and logits alone decide on them."""
    return wanted == NOTHING and not model.redundant and knobs.bias_BV is None


def run(
    model: Transformer, cache: Cache, rows: Rows, stop_ids_BX: jax.Array, n_steps: int
) -> tuple[Cache, Rows, jax.Array]:
    """Runs steps. A row stays where it is when nothing is left, and once it drew a stop id.

    Args:
      stop_ids_BX: int32, padded with -1.

    Returns:
      the cache, the rows, and the tokens that each step added, int32 [N, B]; -1 is none.
    """

    def step(number: jax.Array, loop: tuple[Cache, Rows, jax.Array]):
        cache, rows, tokens_NB = loop
        extended = model.extend(rows.token_B[:, None], rows.position_B, cache)
        assert extended.residual_BTD is not None
        token_B = model.likeliest(extended.residual_BTD)[:, 0]
        # One by one, for a reduction would be a kernel of its own.
        stops = [token_B == stop_ids_B for stop_ids_B in stop_ids_BX.T]
        stops_B = functools.reduce(jnp.logical_or, stops, jnp.zeros(token_B.shape, bool))
        runs_B = rows.left_B > 0
        advanced = Rows(
            jnp.where(runs_B, rows.position_B + 1, rows.position_B),
            jnp.where(runs_B, token_B, rows.token_B),
            jnp.where(runs_B & ~stops_B, rows.left_B - 1, 0),
        )
        # `.at[].set` would have a kernel check that the number is in range.
        tokens_NB = jax.lax.dynamic_update_index_in_dim(
            tokens_NB, jnp.where(runs_B, token_B, -1), number, axis=0
        )
        return extended.cache.pinned(), advanced, tokens_NB

    nothing_NB = jnp.full((n_steps, rows.token_B.shape[0]), -1, jnp.int32)
    return jax.lax.fori_loop(0, n_steps, step, (cache, rows, nothing_NB))

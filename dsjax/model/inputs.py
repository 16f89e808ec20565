"""Prepares what the model reads of a batch: positions, documents, the tokens of MTP modules.

All of it is computed in the order of the sequences and then laid out over the devices, once, before
the model runs. From there on everything is per token; only attention, the balance losses and the
logits that are handed to a user know the devices' order (`dsjax.parallel.context`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.model import rope
from dsjax.parallel.context import arrange


class Ahead(NamedTuple):
    """What the MTP modules read at each position, int32 [..., modules, B, T]."""

    tokens: jax.Array  # the token k places ahead for module k, counted from 1
    # That token's document if it is the position's own, else 0: there is no sequence to balance.
    documents: jax.Array


class Inputs(NamedTuple):
    """Numbers per token, int32 [..., B, T], in the devices' order."""

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None  # attention stays inside a segment; None: inside a row
    documents: jax.Array  # sequences of the balance losses; 0 is padding
    ahead: Ahead | None  # None: the MTP modules do not run


def read_tokens(
    tokens: jax.Array, segment_ids: jax.Array | None, *, isolate: bool, n_mtp: int
) -> Inputs:
    """Prepares token ids, int32 [..., B, T], and lays them out; the arguments are those of
    `in_sequence`.
    """
    return jax.tree.map(arrange, in_sequence(tokens, segment_ids, isolate=isolate, n_mtp=n_mtp))


def in_sequence(
    tokens: jax.Array, segment_ids: jax.Array | None, *, isolate: bool, n_mtp: int
) -> Inputs:
    """Prepares token ids, int32 [..., B, T], and leaves them in the order of their sequences.

    Args:
      segment_ids: int32 document of each token, 0 for padding; None: one document per row. With
        `isolate`, a token of -s has a place in document s, whose tokens do not see it.
      isolate: whether attention, positions and balance losses stay inside a document.
      n_mtp: how many MTP modules run.
    """
    if segment_ids is None:
        isolate, segment_ids = False, jnp.ones_like(tokens)
    if isolate:
        positions = rope.positions_in_segments(jnp.abs(segment_ids))
        documents = jnp.maximum(segment_ids, 0)
    else:
        positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
        documents = (segment_ids > 0).astype(jnp.int32)
    ahead = None
    if n_mtp:
        further = jnp.stack([shift_left(documents, k) for k in range(1, n_mtp + 1)], axis=-3)
        same = further == jnp.expand_dims(documents, -3)
        ahead = Ahead(
            jnp.stack([shift_left(tokens, k) for k in range(1, n_mtp + 1)], axis=-3),
            jnp.where(same, further, 0),
        )
    return Inputs(tokens, positions, segment_ids if isolate else None, documents, ahead)


def shift_left(x: jax.Array, places: int) -> jax.Array:
    """Gives each position the value `places` ahead; the last ones, which have none, get 0."""
    return jnp.pad(x[..., places:], ((0, 0),) * (x.ndim - 1) + ((0, places),))

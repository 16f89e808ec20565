"""Optional reports on drawn tokens: log-probabilities, chosen experts, ids to choose from."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.generate.sampling import Knobs, kept, log_probabilities, repeated
from dsjax.model import token_sets


class Wanted(NamedTuple):
    """Selects the reports. It is static: a program that reports nothing computes nothing extra."""

    logprobs: bool = False
    experts: bool = False
    kept: bool = False
    top: int = 0  # how many of the most likely tokens


NOTHING = Wanted()


class Record(NamedTuple):
    """The reports on tokens [..., T]; None for those not wanted."""

    logprobs: Any = None  # float32 [..., T], log-softmax of the unscaled logits
    sampled_logprobs: Any = None  # float32 [..., T], after temperature and filters
    # int32 [..., T, L, K], of the tokens that were run, that is the predecessor of each drawn token
    experts: Any = None
    # uint32 [..., T, X], sets of the ids that the filters kept, see `dsjax.model.token_sets`
    kept: Any = None
    # int32 and float32 [..., T, top], most likely first, log-softmax of the unscaled logits
    top_ids: Any = None
    top_logprobs: Any = None


def record(
    wanted: Wanted,
    logits_BTV: jax.Array,
    tokens_BT: jax.Array,
    knobs: Knobs,
    experts_LBTK: jax.Array | None,
) -> Record:
    """Builds the reports on tokens drawn from these logits."""
    logprobs = sampled = experts = sets = top_ids = top_logprobs = None
    B, T, V = logits_BTV.shape
    flat_XV, each = logits_BTV.reshape(B * T, V), repeated(knobs, T)
    if wanted.logprobs:
        flat = log_probabilities(flat_XV, tokens_BT.reshape(B * T), each)
        logprobs, sampled = (x.reshape(B, T) for x in flat)
    if wanted.experts:
        assert experts_LBTK is not None
        experts = jnp.moveaxis(experts_LBTK, 0, 2)
    if wanted.kept:
        sets = token_sets.pack(kept(flat_XV, each)).reshape(B, T, -1)
    if wanted.top:
        top_logprobs, top_ids = top(jax.nn.log_softmax(logits_BTV, axis=-1), wanted.top)
    return Record(logprobs, sampled, experts, sets, top_ids, top_logprobs)


def top(logprobs: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the `count` greatest log-probabilities along the last dimension and their ids,
    int32; fewer if the vocabulary has fewer.
    """
    return jax.lax.top_k(logprobs, min(count, logprobs.shape[-1]))

"""Optional reports on drawn tokens: log-probabilities, chosen experts, ids to choose from."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.generate.sampling import Knobs, kept, log_probabilities
from dsjax.model import token_sets


class Wanted(NamedTuple):
    """Selects the reports. It is static: a program that reports nothing computes nothing extra."""

    logprobs: bool = False
    experts: bool = False
    kept: bool = False


NOTHING = Wanted()


class Record(NamedTuple):
    """The reports on tokens [..., T]; None for those not wanted."""

    logprobs: Any = None  # float32 [..., T], log-softmax of the unscaled logits
    sampled_logprobs: Any = None  # float32 [..., T], after temperature and filters
    # int32 [..., T, L, K], of the tokens that were run, that is the predecessor of each drawn token
    experts: Any = None
    # uint32 [..., T, X], sets of the ids that the filters kept, see `dsjax.model.token_sets`
    kept: Any = None


def record(
    wanted: Wanted,
    logits_BTV: jax.Array,
    tokens_BT: jax.Array,
    knobs: Knobs,
    experts_LBTK: jax.Array | None,
) -> Record:
    """Builds the reports on tokens drawn from these logits."""
    logprobs = sampled = experts = sets = None
    B, T, V = logits_BTV.shape
    each = Knobs(*(jnp.repeat(field, T, axis=0) for field in knobs))
    if wanted.logprobs:
        flat = log_probabilities(logits_BTV.reshape(B * T, V), tokens_BT.reshape(B * T), each)
        logprobs, sampled = (x.reshape(B, T) for x in flat)
    if wanted.experts:
        assert experts_LBTK is not None
        experts = jnp.moveaxis(experts_LBTK, 0, 2)
    if wanted.kept:
        sets = token_sets.pack(kept(logits_BTV.reshape(B * T, V), each)).reshape(B, T, -1)
    return Record(logprobs, sampled, experts, sets)

"""Optional reports on drawn tokens: log-probabilities and chosen experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.generate.sampling import Knobs, log_probabilities


class Wanted(NamedTuple):
    """Selects the reports. It is static: a program that reports nothing computes nothing extra."""

    logprobs: bool = False
    experts: bool = False


NOTHING = Wanted()


class Record(NamedTuple):
    """The reports on tokens [..., T]; None for those not wanted."""

    logprobs: Any = None  # float32 [..., T], log-softmax of the unscaled logits
    sampled_logprobs: Any = None  # float32 [..., T], after temperature and filters
    # int32 [..., T, L, K], of the tokens that were run, that is the predecessor of each drawn token
    experts: Any = None


def record(
    wanted: Wanted,
    logits_BTV: jax.Array,
    tokens_BT: jax.Array,
    knobs: Knobs,
    experts_LBTK: jax.Array | None,
) -> Record:
    """Builds the reports on tokens drawn from these logits."""
    logprobs = sampled = experts = None
    if wanted.logprobs:
        B, T, V = logits_BTV.shape
        each = Knobs(*(jnp.repeat(field, T, axis=0) for field in knobs))
        flat = log_probabilities(logits_BTV.reshape(B * T, V), tokens_BT.reshape(B * T), each)
        logprobs, sampled = (x.reshape(B, T) for x in flat)
    if wanted.experts:
        assert experts_LBTK is not None
        experts = jnp.moveaxis(experts_LBTK, 0, 2)
    return Record(logprobs, sampled, experts)

"""What is reported of each drawn token on request, besides its id."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.generate.sampling import Knobs, log_probabilities


class Wanted(NamedTuple):
    """What to report. It is part of a program, so what nobody asks for costs nothing."""

    logprobs: bool = False
    experts: bool = False


NOTHING = Wanted()


class Record(NamedTuple):
    """The report on tokens [B, T]; None for what is not wanted."""

    logprobs_BT: jax.Array | None = None  # float32, under the model: log-softmax of the logits
    sampled_logprobs_BT: jax.Array | None = None  # float32, under the distribution drawn from
    # int32, of the tokens that the model ran, each of them the one before the drawn one
    experts_BTLK: jax.Array | None = None


def record(
    wanted: Wanted,
    logits_BTV: jax.Array,
    tokens_BT: jax.Array,
    knobs: Knobs,
    experts_LBTK: jax.Array | None,
) -> Record:
    """Reports on tokens that were drawn from these logits."""
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

"""The seam between a training step and what it minimises.

A step runs the model on each micro-batch, adds up what an `Objective` makes of the hidden states,
takes the gradient of one scalar and updates. Pre-training (`dsjax.train.loss`) is one objective;
fine-tuning, preference training, reinforcement learning and distillation are others, and the step,
with or without a pipeline, is the same for all.

The scalar is the sum over micro-batches of weight times sum, plus the routers' balance losses.
Micro-batches contribute sums, never means: `Objective.weights` sees the whole batch and divides
once by its count, so the result does not depend on how the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.model.balance import BalanceWeights
from dsjax.model.transformer import Hidden, Transformer

# Arrays [micro-batches, sequences, ...], without the first dimension in what works on one
# micro-batch. `tokens` and `segment_ids`, int32 [.., T + 1], are always there; an objective may ask
# for more, per token (weights, advantages, log-probabilities of another policy) or per sequence.
Batch = dict[str, jax.Array]
# What may change at every step without another compilation, the same on every device: scalars of
# the schedule, and whatever arrays an objective reads and does not train, such as a teacher's head.
Knobs = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class ForwardPass(NamedTuple):
    """How the model runs on a micro-batch; the fields are arguments of `Transformer.hidden`."""

    isolate: bool
    mtp: bool
    balance: BalanceWeights | None
    remat: str


class Weights(NamedTuple):
    """What each micro-batch's terms count in the batch's scalar, each float32 [micro-batches]."""

    sums: dict[str, jax.Array]  # by name of what `Objective.sums` returns; others are not minimised
    balance: jax.Array  # of the balance losses, which are averages over a micro-batch's tokens


class Objective(NamedTuple):
    """What a step minimises.

    Attributes:
      forward: how the model runs.
      weights: of the whole batch and the knobs: what each micro-batch's terms count.
      sums: of the model (for its head), the hidden states, one micro-batch and the knobs: float32
        scalars by name, each a sum over tokens or sequences. Those without a weight are for the
        metrics.
      metrics: of the same sums over the whole batch: what the step reports. `loss` is among them; a
        step whose loss is not finite changes nothing.
    """

    forward: ForwardPass
    weights: Callable[[Batch, Knobs], Weights]
    sums: Callable[[Transformer, Hidden, Batch, Knobs], dict[str, jax.Array]]
    metrics: Callable[[dict[str, jax.Array]], Metrics]


class Totals(NamedTuple):
    """What a step adds up over micro-batches."""

    sums: dict[str, jax.Array]
    balance: jax.Array  # float32, weighted, summed over layers
    dropped_tokens: jax.Array  # int32
    counts_LE: jax.Array | None  # int32, tokens of each expert; None without routed experts


def weigh(
    objective: Objective,
    model: Transformer,
    hidden: Hidden,
    micro_batch: tuple[Batch, Weights],
    knobs: Knobs,
) -> tuple[jax.Array, Totals]:
    """Returns a micro-batch's part of the scalar whose gradient is taken, and its totals."""
    batch, weights = micro_batch
    sums, routing = objective.sums(model, hidden, batch, knobs), hidden.routing
    if routing is None:
        totals = Totals(sums, jnp.float32(0), jnp.int32(0), None)
    else:
        balance = routing.balance_loss.sum() * weights.balance
        totals = Totals(sums, balance, routing.dropped_tokens.sum(), routing.counts_E)
    weighted = sum(sums[name] * weight for name, weight in weights.sums.items())
    return weighted + totals.balance, totals


def sum_over_micro_batches(function: Callable[[Any], Any], batch: Any) -> Any:
    """Adds up a function's values over the leading dimension, one micro-batch at a time."""
    first = jax.tree.map(lambda x: x[0], batch)
    if jax.tree.leaves(batch)[0].shape[0] == 1:
        return function(first)
    zeros = jax.tree.map(
        lambda value: jnp.zeros(value.shape, value.dtype), jax.eval_shape(function, first)
    )
    return jax.lax.scan(
        lambda total, micro_batch: (jax.tree.map(jnp.add, total, function(micro_batch)), None),
        zeros,
        batch,
    )[0]

"""The seam between a training step and what it minimises.

A step runs the model on each micro-batch, adds up what an `Objective` makes of the hidden states,
takes the gradient of one scalar and updates. Pre-training (`dsjax.train.loss`) is one objective;
fine-tuning, preference training, reinforcement learning and distillation are others, and the step,
with or without a pipeline, is the same for all.

The scalar is the sum over micro-batches of weight times sum, plus the routers' balance losses and
what the indexers of sparse attention learn from.
Micro-batches contribute sums, never means: `Objective.weights` sees the whole batch and divides
once by its count, so the result does not depend on how the batch is divided. (A mean of means over
micro-batches with unequal numbers of targets is another loss.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.kernels.sparse_attention import Lesson
from dsjax.model.balance import BalanceWeights
from dsjax.model.inputs import Inputs, read_tokens
from dsjax.model.transformer import Embeddings, Hidden, Transformer
from dsjax.parallel.context import arrange

# What a source gives: arrays [micro-batches, sequences, ...]. `tokens` and `segment_ids`, int32
# [.., T + 1], are always there; an objective may ask for more, per token (weights, advantages,
# log-probabilities of another policy) or per sequence. If `experts` is there, int32 [micro-batches,
# sequences, T + 1, L, K], the MoE layers replay these choices.
Batch = dict[str, jax.Array]
# Values that may change at every step without another compilation, the same on every device: the
# schedule's scalars, and any array that an objective reads but does not train, such as the output
# head of a frozen teacher.
Knobs = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Sums = dict[str, jax.Array]
# Where micro-batches or updates are joined, the numbers with names that end so are not added up:
# the largest is kept. They are never negative.
LARGEST = "_max"


class ForwardPass(NamedTuple):
    """How the model runs; see `dsjax.model.inputs.read_tokens` and `Transformer.forward`."""

    isolate: bool
    mtp: bool
    balance: BalanceWeights | None
    remat: str
    lesson: Lesson | None = "sparse"  # without effect on a model without an indexer
    inner: int | None = None  # the layer, counted from 1, whose output the sums read


class Weights(NamedTuple):
    """The factors of a micro-batch's terms in the scalar, each float32 [micro-batches]."""

    sums: dict[str, jax.Array]  # by the names of `Objective.sums`; sums left out are only reported
    balance: jax.Array  # of balance and index losses, averages over a micro-batch's tokens


class Objective(NamedTuple):
    """What a step minimises.

    Attributes:
      forward: how the model runs on positions 0 to T - 1 of the batch.
      targets: batch -> a tree of the arrays that the next two functions read: per token
        [micro-batches, ..., B, T], per sequence [micro-batches, B]. Only here are tokens in the
        order of their sequence, so this is where to shift them; afterwards hidden states and
        targets alike are in the devices' order (`dsjax.parallel.context`).
      weights: (targets, knobs) -> the factors of each micro-batch's sums.
      sums: (model, hidden states, targets of one micro-batch, knobs) -> float32 scalars by name,
        each a sum over tokens or sequences or, under a name that ends in LARGEST, the largest of
        them. The model is there for its output head.
      metrics: the sums over the whole batch -> what the step reports, `loss` among them. A step
        whose loss is not finite changes nothing.
      embeddings: (model, targets of one micro-batch) -> what replaces the embeddings of some
        tokens, such as what the model sees of a picture; None: nothing does.
    """

    forward: ForwardPass
    targets: Callable[[Batch], Any]
    weights: Callable[[Any, Knobs], Weights]
    sums: Callable[[Transformer, Hidden, Any, Knobs], Sums]
    metrics: Callable[[Sums], Metrics]
    embeddings: Callable[[Any, Any], Embeddings] | None = None


def replacing(objective: Objective, model: Transformer, targets: Any) -> Embeddings | None:
    """Returns what replaces the embeddings of some tokens of a micro-batch; None: nothing."""
    return objective.embeddings(model, targets) if objective.embeddings else None


class Prepared(NamedTuple):
    """A batch, each array [micro-batches, ...], or one of its micro-batches."""

    inputs: Inputs
    targets: Any
    weights: Weights
    experts: jax.Array | None = None  # int32 [..., L, K, B, T], choices to replay


def read_batch(objective: Objective, declared: Transformer, batch: Batch) -> tuple[Inputs, Any]:
    """Computes the arrays that the model and the objective read, and lays them out over the
    devices. Nothing after this shifts tokens.
    """
    forward, targets = objective.forward, objective.targets(batch)
    inputs = read_tokens(
        batch["tokens"][..., :-1],
        batch["segment_ids"][..., :-1],
        isolate=forward.isolate,
        n_mtp=declared.config.n_mtp if forward.mtp else 0,
    )
    return inputs, jax.tree.map(lambda x: arrange(x) if x.ndim > 2 else x, targets)


def read_experts(batch: Batch) -> jax.Array | None:
    """Returns a batch's expert choices for positions 0 to T - 1, int32 [..., L, K, B, T], laid out
    over the devices; None if the routers shall choose.
    """
    if "experts" not in batch:
        return None
    return arrange(jnp.moveaxis(batch["experts"], (-2, -1), (-4, -3))[..., :-1])


def replayed(experts_LKBT: jax.Array | None) -> jax.Array | None:
    """Returns a micro-batch's choices as the model takes them, [L, B, T, K]."""
    return None if experts_LKBT is None else jnp.moveaxis(experts_LKBT, 1, -1)


class Totals(NamedTuple):
    """What a step sums over micro-batches."""

    sums: Sums
    balance: jax.Array  # float32, weighted, summed over layers
    # the same of the index losses; None without an indexer that learns
    index_loss: jax.Array | None
    dropped_tokens: jax.Array  # int32
    counts_LE: jax.Array | None  # int32, tokens of each expert; None without routed experts


def weigh(
    objective: Objective, model: Transformer, hidden: Hidden, micro_batch: Prepared, knobs: Knobs
) -> tuple[jax.Array, Totals]:
    """Returns a micro-batch's contribution to the scalar that is differentiated, and its totals."""
    weights, routing = micro_batch.weights, hidden.routing
    sums = objective.sums(model, hidden, micro_batch.targets, knobs)
    index = None if hidden.index_loss is None else hidden.index_loss.sum() * weights.balance
    if routing is None:
        totals = Totals(sums, jnp.float32(0), index, jnp.int32(0), None)
    else:
        balance = routing.balance_loss.sum() * weights.balance
        totals = Totals(sums, balance, index, routing.dropped_tokens.sum(), routing.counts_E)
    weighted = sum(sums[name] * weight for name, weight in weights.sums.items())
    return weighted + totals.balance + (0.0 if index is None else index), totals


def sum_over_micro_batches(function: Callable[[Any], Any], batch: Any) -> Any:
    """Sums a function's values over the leading dimension, one micro-batch at a time; of those
    whose names end in LARGEST the largest is kept.
    """
    first = jax.tree.map(lambda x: x[0], batch)
    if jax.tree.leaves(batch)[0].shape[0] == 1:
        return function(first)
    zeros = jax.tree.map(
        lambda value: jnp.zeros(value.shape, value.dtype), jax.eval_shape(function, first)
    )

    def add(total: Any, micro_batch: Any) -> tuple[Any, None]:
        return jax.tree_util.tree_map_with_path(_joined, total, function(micro_batch)), None

    return jax.lax.scan(add, zeros, batch)[0]


def _joined(path: Any, total: jax.Array, new: jax.Array) -> jax.Array:
    is_largest = jax.tree_util.keystr(path[-1:], simple=True).endswith(LARGEST)
    return jnp.maximum(total, new) if is_largest else total + new

"""Next-token cross-entropy with multi-token prediction and balance: what pre-training minimises.

Paper: V3 (arXiv:2412.19437), equations 23 to 25. An MTP module has fewer targets than the main
model (the last k positions have none), and still its sum is divided by the main model's count, as
the paper writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.config import Config
from dsjax.model.balance import BalanceWeights
from dsjax.model.head import weighted_nll
from dsjax.model.inputs import shift_left
from dsjax.model.transformer import Hidden, Transformer
from dsjax.train.objective import (
    Batch,
    ForwardPass,
    Knobs,
    Metrics,
    Objective,
    Sums,
    Weights,
)


def target_mask(segment_ids_BX: jax.Array, ahead: int, isolate: bool) -> jax.Array:
    """Marks the positions that have a token to predict.

    Args:
      segment_ids_BX: int32 [..., T + 1], 0 for padding.
      ahead: how many places ahead the target is, 1 for the main model.
      isolate: whether a target must lie in the same document.

    Returns:
      bool [..., T].
    """
    here = segment_ids_BX[..., :-1]
    there = shift_left(segment_ids_BX, ahead)[..., :-1]
    valid = (here > 0) & (there > 0)
    return valid & (here == there) if isolate else valid


class Targets(NamedTuple):
    """The tokens that the main model or an MTP module predicts, one per position."""

    ids: jax.Array  # int32 [..., B, T]
    counted: jax.Array  # float32 [..., B, T], 1 or 0


def pretraining(config: Config) -> Objective:
    """Returns the objective of pre-training: every token that has a successor counts."""
    isolate, n_mtp = config.data.isolate_documents, config.model.n_mtp
    balance = BalanceWeights.of(config.train, config.model, isolated=isolate)
    return next_tokens(
        ForwardPass(isolate, n_mtp > 0, balance, config.train.remat, config.train.indexer),
        lambda batch, ahead: target_mask(batch["segment_ids"], ahead, isolate),
        n_mtp=n_mtp,
        chunk=config.train.loss_chunk,
    )


def next_tokens(
    forward: ForwardPass,
    counted: Callable[[Batch, int], jax.Array],
    *,
    n_mtp: int,
    chunk: int,
) -> Objective:
    """Returns an objective of next-token prediction, MTP and balance losses.

    Its knob is `mtp_weight`. Its sums are `main` and `mtp`, in nats over the targets of the main
    model and of all MTP depths, and the counts `main_targets` and `mtp_targets`. Position t
    predicts token t + 1.

    Args:
      counted: (batch, k) -> which positions' token k places ahead is a target, [..., T].
      n_mtp: MTP modules that run, as `forward` says.
    """

    def targets(batch: Batch) -> list[Targets]:
        def of(ahead: int) -> Targets:
            ids = shift_left(batch["tokens"], ahead)[..., :-1]
            return Targets(ids, counted(batch, ahead).astype(jnp.float32))

        return [of(ahead) for ahead in range(1, n_mtp + 2)]

    def weights(targets: list[Targets], knobs: Knobs) -> Weights:
        counts = targets[0].counted.sum(axis=(1, 2))
        n_targets = jnp.maximum(counts.sum(), 1.0)
        main = jnp.broadcast_to(1.0 / n_targets, counts.shape)
        mtp = knobs["mtp_weight"] / max(n_mtp, 1) * main
        # A balance loss is an average already, so micro-batches weigh as their targets do.
        return Weights({"main": main, "mtp": mtp}, counts / n_targets)

    def sums(model: Transformer, hidden: Hidden, targets: list[Targets], knobs: Knobs) -> Sums:
        weight = model.head_weight()

        def nll(hidden_BTD: jax.Array, targets: Targets) -> tuple[jax.Array, jax.Array]:
            total = weighted_nll(hidden_BTD, weight, *targets, model.policy, chunk)
            return total, targets.counted.sum()

        main, main_targets = nll(hidden.main_BTD, targets[0])
        mtp = mtp_targets = jnp.float32(0)
        if hidden.mtp_DBTD is not None:
            for hidden_BTD, ahead in zip(hidden.mtp_DBTD, targets[1:], strict=True):
                depth_nll, depth_targets = nll(hidden_BTD, ahead)
                mtp, mtp_targets = mtp + depth_nll, mtp_targets + depth_targets
        counts = {"main_targets": main_targets, "mtp_targets": mtp_targets}
        return {"main": main, "mtp": mtp, **counts}

    def metrics(sums: Sums) -> Metrics:
        return {
            "loss": sums["main"] / jnp.maximum(sums["main_targets"], 1.0),
            "mtp_loss": sums["mtp"] / jnp.maximum(sums["mtp_targets"], 1.0),
        }

    return Objective(forward, targets, weights, sums, metrics)

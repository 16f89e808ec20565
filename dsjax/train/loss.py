"""The objective of pre-training: next-token cross-entropy, multi-token prediction and balance.

Paper: V3 (arXiv:2412.19437), equations 23 to 25. An MTP module has fewer targets than the main
model (the last k positions have none) and yet is divided by the main model's count, as the paper
writes it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsjax.config import Config
from dsjax.model.balance import BalanceWeights
from dsjax.model.head import weighted_nll
from dsjax.model.transformer import Hidden, Transformer
from dsjax.parallel.context import arrange
from dsjax.train.objective import Batch, ForwardPass, Knobs, Metrics, Objective, Weights


def target_mask(segment_ids_BX: jax.Array, ahead: int, isolate: bool) -> jax.Array:
    """Which positions have a token to predict.

    Args:
      segment_ids_BX: int32 [B, T + 1], 0 for padding.
      ahead: how many places ahead the target is, 1 for the main model.
      isolate: whether a target must lie in the same document.

    Returns:
      bool [B, T].
    """
    length = segment_ids_BX.shape[1] - 1
    here = segment_ids_BX[:, :length]
    there = jnp.pad(segment_ids_BX[:, ahead:], ((0, 0), (0, ahead - 1)))
    valid = (here > 0) & (there > 0)
    return valid & (here == there) if isolate else valid


def pretraining(config: Config) -> Objective:
    """Next-token prediction, MTP and balance losses.

    Its knobs are `mtp_weight`, and its sums `main` and `mtp` (nats over the targets of the main
    model and of all MTP depths) with their counts `main_targets` and `mtp_targets`. Position t of a
    batch predicts token t + 1.
    """
    isolate, chunk = config.data.isolate_documents, config.train.loss_chunk
    n_mtp = config.model.n_mtp

    def weights(batch: Batch, knobs: Knobs) -> Weights:
        n_micro_batches, rows, _ = (segment_ids := batch["segment_ids"]).shape
        mask = target_mask(segment_ids.reshape(n_micro_batches * rows, -1), 1, isolate)
        targets = mask.reshape(n_micro_batches, -1).sum(axis=1).astype(jnp.float32)
        n_targets = jnp.maximum(targets.sum(), 1.0)
        main = jnp.broadcast_to(1.0 / n_targets, targets.shape)
        mtp = knobs["mtp_weight"] / max(n_mtp, 1) * main
        return Weights({"main": main, "mtp": mtp}, targets / n_targets)

    def sums(
        model: Transformer, hidden: Hidden, batch: Batch, knobs: Knobs
    ) -> dict[str, jax.Array]:
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        weight = model.head_weight()

        def nll(hidden_BTD: jax.Array, ahead: int) -> tuple[jax.Array, jax.Array]:
            mask_BT = target_mask(segment_ids, ahead, isolate)
            targets_BT = jnp.pad(tokens[:, ahead:], ((0, 0), (0, ahead - 1)))
            weights_BT = mask_BT.astype(jnp.float32)
            total = weighted_nll(
                hidden_BTD, weight, arrange(targets_BT), arrange(weights_BT), model.policy, chunk
            )
            return total, weights_BT.sum()

        main, main_targets = nll(hidden.main_BTD, 1)
        mtp = mtp_targets = jnp.float32(0)
        modules = [] if hidden.mtp_DBTD is None else hidden.mtp_DBTD
        for depth, hidden_BTD in enumerate(modules, start=1):
            depth_nll, depth_targets = nll(hidden_BTD, depth + 1)
            mtp, mtp_targets = mtp + depth_nll, mtp_targets + depth_targets
        counts = {"main_targets": main_targets, "mtp_targets": mtp_targets}
        return {"main": main, "mtp": mtp, **counts}

    def metrics(sums: dict[str, jax.Array]) -> Metrics:
        return {
            "loss": sums["main"] / jnp.maximum(sums["main_targets"], 1.0),
            "mtp_loss": sums["mtp"] / jnp.maximum(sums["mtp_targets"], 1.0),
        }

    forward = ForwardPass(isolate, n_mtp > 0, BalanceWeights.of(config), config.train.remat)
    return Objective(forward, weights, sums, metrics)

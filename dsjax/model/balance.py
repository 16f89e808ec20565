"""Load balancing of experts: the bias update and the balance losses.

Every loss has the form sum_i f_i * P_i per sequence. f_i is how often i is chosen, scaled so that
an even load gives 1 for each i; P_i is the mean share of i in the scores and carries the gradient.
An even load with uniform scores gives exactly 1. The losses differ in what i is and in what counts
as chosen:

* sequence-wise (V3, equations 17 to 20): i is an expert, chosen if it is among the K best
  *unbiased* scores of all experts;
* expert-level (V1; V2 equations 23 to 25): i is an expert, chosen if the router chose it;
* device-level (V1; V2 equations 26 to 28): i is a group of experts; f is the mean over the group, P
  the sum;
* communication (V2 equations 29 to 31): i is a group, chosen if the token is sent to at least one
  of its experts.

A sequence is a row. With isolated documents it is a document, and documents are averaged by length,
so that packing does not change the loss. Padding is never counted.

Papers: DeepSeekMoE arXiv:2401.06066 section 3.3; V2 arXiv:2405.04434 section 2.2.3; V3
arXiv:2412.19437 section 2.1.2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.config import ModelConfig, TrainConfig
from dsjax.model.router import Routing
from dsjax.parallel import context


class BalanceWeights(NamedTuple):
    """The weight of each balance loss, and what the losses count."""

    sequence: float
    expert: float
    device: float
    communication: float
    n_devices: int  # groups of experts in the device-level and communication losses
    isolated: bool  # whether a sequence is a document or a whole row

    @classmethod
    def of(cls, train: TrainConfig, model: ModelConfig, *, isolated: bool) -> BalanceWeights:
        return cls(
            train.sequence_balance,
            train.expert_balance,
            train.device_balance,
            train.communication_balance,
            train.n_balance_devices or model.n_expert_groups,
            isolated,
        )


def update_bias(bias_LE: jax.Array, counts_LE: jax.Array, speed: jax.Array | float) -> jax.Array:
    """Moves each expert's selection bias one step towards an even load (V3 section 2.1.2).

    Args:
      counts_LE: assignments to each expert in the whole global batch.
      speed: gamma; 0 leaves the bias unchanged.
    """
    counts_LE = counts_LE.astype(jnp.float32)
    return bias_LE + speed * jnp.sign(counts_LE.mean(axis=-1, keepdims=True) - counts_LE)


def max_violation(counts_LE: jax.Array) -> jax.Array:
    """Returns (highest load - mean load) / mean load, float32 [L]; arXiv:2408.15664 section 4.1. A
    layer without any load has 0.
    """
    counts_LE = counts_LE.astype(jnp.float32)
    mean_L, highest_L = counts_LE.mean(axis=-1), counts_LE.max(axis=-1)
    loaded_L = mean_L > 0
    return jnp.where(loaded_L, highest_L / jnp.where(loaded_L, mean_L, 1.0) - 1.0, 0.0)


def _chosen(experts_MK: jax.Array, n_experts: int) -> jax.Array:
    """Marks each token's chosen experts with 1.0: [..., K] -> float32 [..., E]."""
    return jax.nn.one_hot(experts_MK, n_experts, dtype=jnp.float32).sum(axis=-2)


def _frequency_times_share(
    f_BTX: jax.Array, share_BTX: jax.Array, documents_BT: jax.Array, isolated: bool
) -> jax.Array:
    """Returns the mean over documents, weighted by length, of sum_i mean_t(f) * mean_t(share)."""
    # Equal to the mean over tokens of share times the document's mean of f, which has no gradient.
    valid_BT1 = (documents_BT > 0).astype(jnp.float32)[:, :, None]
    f_BTX *= valid_BT1
    if isolated:
        f_BTX, lengths = (_document_sums(x, documents_BT) for x in (f_BTX, valid_BT1))
    else:
        f_BTX, lengths = (x.sum(axis=1, keepdims=True) for x in (f_BTX, valid_BT1))
    total = (share_BTX * valid_BT1 * (f_BTX / jnp.maximum(lengths, 1.0))).sum()
    return total / jnp.maximum(valid_BT1.sum(), 1.0)


def _document_sums(x_BTX: jax.Array, documents_BT: jax.Array) -> jax.Array:
    """Sums x over each token's document: [B, T, X]; exact for counts."""
    index = jnp.arange(documents_BT.shape[1], dtype=jnp.int32)[None]
    border = documents_BT[:, 1:] != documents_BT[:, :-1]
    first, last = (
        jnp.pad(border, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1))
    )
    start_BT = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    end_BT = jax.lax.cummin(jnp.where(last, index, index.size - 1), axis=1, reverse=True)
    running_BTX = jnp.cumsum(x_BTX, axis=1)
    until = jnp.take_along_axis(running_BTX, end_BT[:, :, None], axis=1)
    return until - jnp.take_along_axis(running_BTX - x_BTX, start_BT[:, :, None], axis=1)


def balance_loss(
    routing: Routing, documents_BT: jax.Array, weights: BalanceWeights, config: ModelConfig
) -> jax.Array:
    """Sums one layer's weighted balance losses.

    Args:
      documents_BT: int32, the document of each token, 0 for padding; a row is one document unless
        `weights.isolated`.

    Returns:
      float32 scalar.
    """
    B, T = documents_BT.shape
    E, K = config.n_routed_experts, config.n_activated_experts
    D, isolated = weights.n_devices, weights.isolated
    # Document sums need each sequence's tokens in order, on one device.
    documents_BT = context.restore(documents_BT)
    scores_ME, experts_MK = (
        context.restore(x.reshape(B, T, -1)).reshape(x.shape)
        for x in (routing.scores_ME, routing.experts_MK)
    )
    share_BTE = (scores_ME / scores_ME.sum(axis=-1, keepdims=True)).reshape(B, T, E)
    total = jnp.float32(0)
    if weights.sequence:
        best = jax.lax.top_k(jax.lax.stop_gradient(scores_ME), K)[1]
        f_BTE = (_chosen(best, E) * (E / K)).reshape(B, T, E)
        total += weights.sequence * _frequency_times_share(f_BTE, share_BTE, documents_BT, isolated)
    chosen_BTE = _chosen(experts_MK, E).reshape(B, T, E)
    if weights.expert:
        total += weights.expert * _frequency_times_share(
            chosen_BTE * (E / K), share_BTE, documents_BT, isolated
        )
    share_BTD = share_BTE.reshape(B, T, D, E // D).sum(axis=-1)
    chosen_BTDX = chosen_BTE.reshape(B, T, D, E // D)
    if weights.device:
        f_BTD = chosen_BTDX.mean(axis=-1) * (E / K)
        total += weights.device * _frequency_times_share(f_BTD, share_BTD, documents_BT, isolated)
    if weights.communication:
        f_BTD = chosen_BTDX.max(axis=-1) * (D / config.n_limited_groups)
        total += weights.communication * _frequency_times_share(
            f_BTD, share_BTD, documents_BT, isolated
        )
    return total

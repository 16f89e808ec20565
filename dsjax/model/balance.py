"""Keeping experts evenly used: the bias update and the balance losses.

Every loss has the form sum over i of f_i * P_i for one sequence: f_i is how often i is chosen,
scaled so that an even load gives 1 each, and P_i is the mean score share of i, through which the
gradient flows. An even load and uniform scores give exactly 1. They differ in what i is and what
counts as chosen:

* sequence-wise (V3, equations 17 to 20): i an expert, chosen when among the K best *unbiased*
  scores of all experts;
* expert-level (V1; V2 equations 23 to 25): i an expert, chosen as the router did;
* device-level (V1; V2 equations 26 to 28): i a group of experts, f the mean and P the sum over the
  group;
* communication (V2 equations 29 to 31): i a group, chosen when the token is sent to at least one of
  its experts.

A sequence is a row; when documents are isolated it is a document, and documents are averaged by
their length, so that packing does not change the loss. Padding counts nowhere.

Papers: DeepSeekMoE arXiv:2401.06066 section 3.3; V2 arXiv:2405.04434 section 2.2.3; V3
arXiv:2412.19437 section 2.1.2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.config import Config, ModelConfig
from dsjax.model.router import Routing
from dsjax.parallel import context


class BalanceWeights(NamedTuple):
    """Weight of each balance loss, and the groups that stand for devices."""

    sequence: float
    expert: float
    device: float
    communication: float
    n_devices: int

    @classmethod
    def of(cls, config: Config) -> BalanceWeights:
        train = config.train
        return cls(
            train.sequence_balance,
            train.expert_balance,
            train.device_balance,
            train.communication_balance,
            train.n_balance_devices or config.model.n_expert_groups,
        )


def update_bias(bias_LE: jax.Array, counts_LE: jax.Array, speed: jax.Array | float) -> jax.Array:
    """Moves each expert's selection bias one step towards an even load (V3 section 2.1.2).

    Args:
      counts_LE: assignments of each expert over the whole global batch.
      speed: gamma; 0 leaves the bias alone.
    """
    counts_LE = counts_LE.astype(jnp.float32)
    return bias_LE + speed * jnp.sign(counts_LE.mean(axis=-1, keepdims=True) - counts_LE)


def max_violation(counts_LE: jax.Array) -> jax.Array:
    """(highest load - mean load) / mean load, float32 [L]; arXiv:2408.15664 section 4.1."""
    counts_LE = counts_LE.astype(jnp.float32)
    mean_L = jnp.maximum(counts_LE.mean(axis=-1), 1.0)
    return counts_LE.max(axis=-1) / mean_L - 1.0


def _chosen(experts_MK: jax.Array, n_experts: int) -> jax.Array:
    """1.0 where a token's choice includes an expert: [..., K] -> float32 [..., E]."""
    return jax.nn.one_hot(experts_MK, n_experts, dtype=jnp.float32).sum(axis=-2)


def _document_sums(x_BTX: jax.Array, documents_BT: jax.Array) -> jax.Array:
    """Running sums that restart with each document: [B, T, X]."""
    index = jnp.arange(documents_BT.shape[1], dtype=jnp.int32)[None]
    first = jnp.pad(
        documents_BT[:, 1:] != documents_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )
    start_BT = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    running = jnp.cumsum(x_BTX, axis=1)
    before = jnp.take_along_axis(running - x_BTX, start_BT[:, :, None], axis=1)
    return running - before


def _frequency_times_share(
    f_BTX: jax.Array, share_BTX: jax.Array, documents_BT: jax.Array
) -> jax.Array:
    """Mean over documents, weighted by length, of sum_i mean_t(f) * mean_t(share). Scalar."""
    valid_BT = documents_BT > 0
    last_BT = (
        jnp.pad(documents_BT[:, 1:] != documents_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
        & valid_BT
    )
    valid = valid_BT.astype(jnp.float32)[:, :, None]
    length_BT = _document_sums(valid, documents_BT)[:, :, 0]
    product_BT = (
        _document_sums(f_BTX * valid, documents_BT)
        * _document_sums(share_BTX * valid, documents_BT)
    ).sum(-1)
    # length * (sum / length) * (sum / length)
    per_document = jnp.where(last_BT, product_BT / jnp.maximum(length_BT, 1.0), 0.0)
    return per_document.sum() / jnp.maximum(valid.sum(), 1.0)


def balance_loss(
    routing: Routing, documents_BT: jax.Array, weights: BalanceWeights, config: ModelConfig
) -> jax.Array:
    """Adds up one layer's weighted balance losses.

    Args:
      documents_BT: int32 id of each token's document (row-wide when documents are not isolated); 0
        is padding.

    Returns:
      float32 scalar.
    """
    B, T = documents_BT.shape
    E, K = config.n_routed_experts, config.n_activated_experts
    D = weights.n_devices
    # A sequence's tokens together, in their order.
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
        total += weights.sequence * _frequency_times_share(f_BTE, share_BTE, documents_BT)
    chosen_BTE = _chosen(experts_MK, E).reshape(B, T, E)
    if weights.expert:
        total += weights.expert * _frequency_times_share(
            chosen_BTE * (E / K), share_BTE, documents_BT
        )
    share_BTD = share_BTE.reshape(B, T, D, E // D).sum(axis=-1)
    chosen_BTDX = chosen_BTE.reshape(B, T, D, E // D)
    if weights.device:
        f_BTD = chosen_BTDX.mean(axis=-1) * (E / K)
        total += weights.device * _frequency_times_share(f_BTD, share_BTD, documents_BT)
    if weights.communication:
        f_BTD = chosen_BTDX.max(axis=-1) * (D / config.n_limited_groups)
        total += weights.communication * _frequency_times_share(f_BTD, share_BTD, documents_BT)
    return total

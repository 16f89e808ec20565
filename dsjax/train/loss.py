"""The objective of pre-training: next-token cross-entropy, multi-token prediction and balance.

The logits of a batch never exist at once. `cross_entropy` walks over chunks of positions; since the
loss is a plain sum, each chunk's gradient is known as soon as its logits are, so the forward pass
makes it there and then and the backward pass only scales it: three vocabulary-sized products a
chunk, none of them twice.

Paper: V3 (arXiv:2412.19437), equations 23 to 25. An MTP module has fewer targets than the main
model (the last k positions have none) and yet is divided by the main model's count, as the paper
writes it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsjax.config import Config
from dsjax.model.balance import BalanceWeights
from dsjax.model.transformer import Hidden, Transformer
from dsjax.parallel.context import arrange, pieces
from dsjax.parallel.sharding import at_use, into_parts, parts_here
from dsjax.precision.policy import Policy
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


@jax.named_scope("head")
def cross_entropy(
    hidden_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    policy: Policy,
    chunk: int,
) -> jax.Array:
    """Sums the negative log-likelihood of the unmasked targets, in nats.

    Args:
      hidden_BTD: what the output head reads.
      w_DV: the head's float32 weight.
      chunk: about how many tokens' logits exist at once on a device.

    Returns:
      float32 scalar.
    """
    hidden_BTD, targets_BT, mask_BT = map(pieces, (hidden_BTD, targets_BT, mask_BT))
    batch, length = targets_BT.shape
    # Chunks are cut along the sequence, so that a batch split over devices stays split.
    width = min(max(chunk // (batch // parts_here("pieces")), 1), length)
    return _cross_entropy(hidden_BTD, w_DV, targets_BT, mask_BT, policy, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden_BTD, w_DV, targets_BT, mask_BT, policy, width):
    weight = at_use(w_DV, ("embed", "vocab"), policy.compute).astype(policy.compute)

    def step(total, chunk):
        _, nll_Bt, _ = _chunk_nll(weight, *chunk)
        return total + nll_Bt.sum(), None

    return jax.lax.scan(
        step, jnp.float32(0), _chunks(hidden_BTD, targets_BT, mask_BT, policy, width)
    )[0]


def _cross_entropy_forward(hidden_BTD, w_DV, targets_BT, mask_BT, policy, width):
    weight = at_use(w_DV, ("embed", "vocab"), policy.compute).astype(policy.compute)

    def step(carry, chunk):
        total, dw_DV = carry
        hidden, targets, mask = chunk
        logits, nll_Bt, normalizer = _chunk_nll(weight, hidden, targets, mask)
        hit = _hits(targets, logits.shape[-1])
        dlogits = jnp.exp(logits - normalizer[..., None]) - hit.astype(jnp.float32)
        dlogits = jnp.where(mask[..., None], dlogits, 0.0).astype(policy.compute)
        dhidden = jnp.matmul(dlogits, weight.T, preferred_element_type=policy.compute)
        chunk_dw_DV = jnp.tensordot(
            hidden, dlogits, ((0, 1), (0, 1)), preferred_element_type=jnp.float32
        )
        # Summed straight into each device's part: whole, it is the largest array of all.
        dw_DV += into_parts(chunk_dw_DV, "embed", "vocab")
        return (total + nll_Bt.sum(), dw_DV), dhidden

    start = (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
    chunks = _chunks(hidden_BTD, targets_BT, mask_BT, policy, width)
    (total, dw_DV), dhidden = jax.lax.scan(step, start, chunks)
    batch, length, dim = hidden_BTD.shape
    dhidden_BTD = (
        dhidden.swapaxes(0, 1).reshape(batch, -1, dim)[:, :length].astype(hidden_BTD.dtype)
    )
    return total, (dhidden_BTD, dw_DV)


def _cross_entropy_backward(policy, width, residuals, cotangent):
    dhidden_BTD, dw_DV = residuals
    return dhidden_BTD * cotangent.astype(dhidden_BTD.dtype), dw_DV * cotangent, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _chunks(hidden_BTD, targets_BT, mask_BT, policy, width):
    """Cuts [B, T, ...] into [chunks, B, width, ...]; masked positions fill the last one up."""
    filling = -targets_BT.shape[1] % width

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, filling)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, width, *x.shape[2:]).swapaxes(0, 1)

    return cut(hidden_BTD.astype(policy.compute)), cut(targets_BT), cut(mask_BT)


def _chunk_nll(weight, hidden, targets, mask):
    """Logits, masked negative log-likelihood and log normaliser of one chunk, float32."""
    logits = jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.where(_hits(targets, logits.shape[-1]), logits, 0.0).sum(axis=-1)
    return logits, jnp.where(mask, normalizer - chosen, 0.0), normalizer


def _hits(targets: jax.Array, vocab_size: int) -> jax.Array:
    """Where each target stands in its row of the vocabulary. A comparison, not a lookup: a row may
    be split over devices, and XLA (of jax 0.10 to 0.12) aborts at some lookups in a pipeline.
    """
    return jnp.arange(vocab_size, dtype=targets.dtype)[None, None] == targets[..., None]


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
            total = cross_entropy(
                hidden_BTD, weight, arrange(targets_BT), arrange(mask_BT), model.policy, chunk
            )
            return total, mask_BT.sum().astype(jnp.float32)

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

"""The training loss: next-token cross-entropy, multi-token prediction and balance.

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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.config import Config
from dsjax.model.balance import BalanceWeights
from dsjax.model.transformer import Hidden, Transformer
from dsjax.parallel.context import arrange, pieces
from dsjax.parallel.sharding import at_use, into_parts, parts_here
from dsjax.precision.policy import Policy


class Losses(NamedTuple):
    """Sums over a micro-batch; dividing is left to whoever knows the whole batch."""

    main: jax.Array  # float32, nats over the main model's targets
    main_targets: jax.Array  # float32
    mtp: jax.Array  # float32, nats over all depths' targets
    mtp_targets: jax.Array  # float32
    balance: jax.Array  # float32, weighted, summed over layers, averaged over tokens
    dropped_tokens: jax.Array  # int32
    counts_LE: jax.Array | None  # int32, tokens of each expert


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


def losses(model: Transformer, batch: dict[str, jax.Array], config: Config) -> Losses:
    """Runs the model on a micro-batch and sums its losses.

    Args:
      batch: `tokens` and `segment_ids`, int32 [B, T + 1]; position t predicts token t + 1.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    hidden = model.hidden(
        tokens[:, :-1],
        segment_ids[:, :-1],
        isolate=config.data.isolate_documents,
        balance=BalanceWeights.of(config),
        remat=config.train.remat,
    )
    return losses_of_hidden(model, hidden, batch, config)


def losses_of_hidden(
    model: Transformer, hidden: Hidden, batch: dict[str, jax.Array], config: Config
) -> Losses:
    """Sums the losses of a micro-batch whose forward pass is done; `model` gives the head."""
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    isolate, chunk = config.data.isolate_documents, config.train.loss_chunk
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
    routing = hidden.routing
    return Losses(
        main,
        main_targets,
        mtp,
        mtp_targets,
        routing.balance_loss.sum() if routing else jnp.float32(0),
        routing.dropped_tokens.sum() if routing else jnp.int32(0),
        routing.counts_E if routing else None,
    )

"""Log-likelihoods of given tokens, computed a chunk of positions at a time, so that the logits of a
batch never exist at once.

`predict` computes a chunk. Three functions walk over the chunks with it:

* `weighted_nll`, a weighted sum with its gradient, is what training minimises. Since the sum is
  linear in the chunks, a chunk's gradient is known as soon as its logits are, so the forward pass
  computes it and the backward pass only scales it: three vocabulary-sized products per chunk, none
  of them twice.
* `token_nll` returns one value per token, for objectives that are not linear in them. Its backward
  pass computes the logits again: four products per chunk.
* `token_scores` also says whether each token is the likeliest. It has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.parallel.context import join_length, split_length
from dsjax.parallel.sharding import gather_for_use, parts_here, reduce_to_shards
from dsjax.precision.matmul import vocabulary_logits
from dsjax.precision.policy import Policy


class Prediction(NamedTuple):
    """The head's output for some hidden states, all float32."""

    logits: jax.Array  # [..., V]
    nll: jax.Array  # [...], of the targets, in nats
    normalizer: jax.Array  # [...], the log of the sum of exp(logits)


def predict(hidden: jax.Array, w_DV: jax.Array, targets: jax.Array, policy: Policy) -> Prediction:
    """Computes the logits of hidden states [..., D], and the nats of target ids, int32 [...]."""
    logits = vocabulary_logits(hidden, w_DV, policy)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.where(_hits(targets, logits), logits, 0.0).sum(axis=-1)
    return Prediction(logits, normalizer - chosen, normalizer)


@jax.named_scope("head")
def weighted_nll(
    hidden_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    policy: Policy,
    chunk: int,
) -> jax.Array:
    """Sums weight times negative log-likelihood of the targets, in nats.

    Args:
      hidden_BTD: what the output head reads.
      w_DV: the head's float32 weight.
      weights_BT: float32 constants, through which no gradient flows. A token of weight 0 has no
        effect, even if its likelihood is not finite.
      chunk: the approximate number of tokens whose logits exist at once on a device.

    Returns:
      float32 scalar.
    """
    rows = map(split_length, (hidden_BTD, targets_BT, weights_BT))
    hidden, targets, weights = rows
    return _weighted_nll(hidden, w_DV, targets, weights, policy, _width(targets, chunk))


@jax.named_scope("head")
def token_nll(
    hidden_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, policy: Policy, chunk: int
) -> jax.Array:
    """Returns the negative log-likelihood of each target, float32 [B, T], in nats; the arguments
    are those of `weighted_nll`.
    """
    hidden, targets = split_length(hidden_BTD), split_length(targets_BT)
    return join_length(_token_nll(hidden, w_DV, targets, policy, _width(targets, chunk)))


@jax.named_scope("head")
def token_scores(
    hidden_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, policy: Policy, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the values of `token_nll`, and whether each target is the likeliest token, bool
    [B, T]. Cannot be differentiated.
    """

    def score(prediction: Prediction, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return prediction.nll, prediction.logits.argmax(axis=-1) == targets

    hidden, targets = split_length(hidden_BTD), split_length(targets_BT)
    width = _width(targets, chunk)
    nll, likeliest = _map_chunks(score, hidden, w_DV, targets, policy, width)
    return join_length(nll), join_length(likeliest)


def _width(targets: jax.Array, chunk: int) -> int:
    """Returns the number of positions per chunk."""
    # Chunks are cut along the sequence, so that a batch split over devices stays split.
    batch, length = targets.shape
    return min(max(chunk // (batch // parts_here("length_shards")), 1), length)


def _hits(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """Marks each target in its row of the vocabulary."""
    # A comparison, not a lookup: a row may be split over devices, and XLA (of jax 0.10 to 0.12)
    # aborts at some lookups in a pipeline.
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return ids == targets[..., None]


def _head_weight(w_DV: jax.Array, policy: Policy) -> jax.Array:
    return gather_for_use(w_DV, ("embed", "vocab"), policy.compute).astype(policy.compute)


def _cut(x: jax.Array, width: int) -> jax.Array:
    """Reshapes [B, T, ...] to [chunks, B, width, ...]; zeros fill the last chunk."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % width)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, width, *x.shape[2:]).swapaxes(0, 1)


def _join(x: jax.Array, length: int) -> jax.Array:
    """Undoes `_cut`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def _map_chunks(
    function: Callable[[Prediction, jax.Array], Any],
    hidden_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    policy: Policy,
    width: int,
) -> Any:
    """Applies a function to the prediction and the targets of each chunk; values are [B, T]."""
    weight = _head_weight(w_DV, policy)
    values = jax.lax.map(
        lambda chunk: function(predict(chunk[0], weight, chunk[1], policy), chunk[1]),
        (_cut(hidden_BTD.astype(policy.compute), width), _cut(targets_BT, width)),
    )
    return jax.tree.map(lambda x: _join(x, targets_BT.shape[1]), values)


def _weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
    # Selected as well as multiplied: 0 times infinity is not 0.
    return jnp.where(weights != 0, weights * values, 0.0)


def _weighted_chunks(hidden_BTD, targets_BT, weights_BT, policy, width):
    hidden_BTD = hidden_BTD.astype(policy.compute)
    return tuple(_cut(x, width) for x in (hidden_BTD, targets_BT, weights_BT))


def _sum_and_gradients(hidden_BTD, w_DV, targets_BT, weights_BT, policy, width):
    """Returns the weighted sum and its gradients with respect to hidden states and head."""
    weight = _head_weight(w_DV, policy)

    def step(carry, chunk):
        total, dw_DV = carry
        hidden, targets, weights = chunk
        logits, nll, normalizer = predict(hidden, weight, targets, policy)
        hits = _hits(targets, logits).astype(jnp.float32)
        dlogits = _weigh(weights[..., None], jnp.exp(logits - normalizer[..., None]) - hits)
        dlogits = dlogits.astype(policy.compute)
        dhidden = jnp.matmul(dlogits, weight.T, preferred_element_type=policy.compute)
        chunk_dw_DV = jnp.tensordot(
            hidden, dlogits, ((0, 1), (0, 1)), preferred_element_type=jnp.float32
        )
        # Summed directly into each device's part: the whole is the largest array of all.
        dw_DV += reduce_to_shards(chunk_dw_DV, "embed", "vocab")
        return (total + _weigh(weights, nll).sum(), dw_DV), dhidden

    start = (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
    chunks = _weighted_chunks(hidden_BTD, targets_BT, weights_BT, policy, width)
    (total, dw_DV), dhidden = jax.lax.scan(step, start, chunks)
    return total, _join(dhidden, targets_BT.shape[1]).astype(hidden_BTD.dtype), dw_DV


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted_nll(hidden_BTD, w_DV, targets_BT, weights_BT, policy, width):
    weight = _head_weight(w_DV, policy)

    def step(total, chunk):
        hidden, targets, weights = chunk
        return total + _weigh(weights, predict(hidden, weight, targets, policy).nll).sum(), None

    chunks = _weighted_chunks(hidden_BTD, targets_BT, weights_BT, policy, width)
    return jax.lax.scan(step, jnp.float32(0), chunks)[0]


def _weighted_nll_forward(hidden_BTD, w_DV, targets_BT, weights_BT, policy, width):
    total, *gradients = _sum_and_gradients(hidden_BTD, w_DV, targets_BT, weights_BT, policy, width)
    return total, gradients


def _weighted_nll_backward(policy, width, gradients, cotangent):
    dhidden_BTD, dw_DV = gradients
    return dhidden_BTD * cotangent.astype(dhidden_BTD.dtype), dw_DV * cotangent, None, None


_weighted_nll.defvjp(_weighted_nll_forward, _weighted_nll_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_nll(hidden_BTD, w_DV, targets_BT, policy, width):
    return _map_chunks(lambda p, _: p.nll, hidden_BTD, w_DV, targets_BT, policy, width)


def _token_nll_forward(hidden_BTD, w_DV, targets_BT, policy, width):
    nll_BT = _token_nll(hidden_BTD, w_DV, targets_BT, policy, width)
    return nll_BT, (hidden_BTD, w_DV, targets_BT)


def _token_nll_backward(policy, width, residuals, cotangent_BT):
    hidden_BTD, w_DV, targets_BT = residuals
    # The gradient of a function of these values is that of their sum weighted by its cotangents.
    _, dhidden_BTD, dw_DV = _sum_and_gradients(
        hidden_BTD, w_DV, targets_BT, cotangent_BT, policy, width
    )
    return dhidden_BTD, dw_DV, None


_token_nll.defvjp(_token_nll_forward, _token_nll_backward)

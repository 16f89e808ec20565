"""What the logits are needed for, computed a chunk of positions at a time, so that the logits of a
batch never exist at once.

`predict` computes the log-likelihoods of a chunk. These functions walk over the chunks:

* `weighted_loss`, a weighted sum of a loss per token with its gradient, is what training minimises.
  Since the sum is linear in the chunks, a chunk's gradient is known as soon as its logits are, so
  the forward pass computes it and the backward pass only scales it: three vocabulary-sized products
  per chunk, none of them twice. A `TokenLoss` says what is summed: `weighted_nll` is its case of
  log-likelihoods; distillation compares with the logits of a teacher.
* `token_nll` returns one value per token, for objectives that are not linear in them. Its backward
  pass computes the logits again: four products per chunk. `token_nll_and_entropy` returns besides
  how undecided the model is at each token.
* `map_logits` returns any function of each token's logits, and `token_scores` is its case of
  likelihoods and whether each token is the likeliest. Neither has a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from dsjax.model import token_sets
from dsjax.parallel.context import join_length, split_length
from dsjax.parallel.sharding import gather_for_use, parts_here, reduce_to_shards
from dsjax.precision.matmul import vocabulary_logits
from dsjax.precision.policy import Policy
from dsjax.precision.small_weights import Weight, at_use

# A loss per token as a function of its logits: (logits [..., V], what else is known of the tokens,
# weights of further heads) -> (losses [...], their derivatives by the logits [..., V]), float32.
TokenLoss = Callable[[jax.Array, Any, tuple[jax.Array, ...]], tuple[jax.Array, jax.Array]]


class Prediction(NamedTuple):
    """The head's output for some hidden states, all float32."""

    logits: jax.Array  # [..., V]
    nll: jax.Array  # [...], of the targets, in nats
    normalizer: jax.Array  # [...], the log of the sum of exp(logits)


def predict(hidden: jax.Array, w_DV: jax.Array, targets: jax.Array, policy: Policy) -> Prediction:
    """Computes the logits of hidden states [..., D], and the nats of target ids, int32 [...]."""
    return _predict(vocabulary_logits(hidden, w_DV, policy), targets)


def _predict(logits: jax.Array, targets: jax.Array) -> Prediction:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.where(_hits(targets, logits), logits, 0.0).sum(axis=-1)
    return Prediction(logits, normalizer - chosen, normalizer)


class Drawn(NamedTuple):
    """Tokens that were drawn, and what from."""

    ids: jax.Array  # int32 [...]
    kept: jax.Array | None  # uint32 [..., X], the ids to choose from (`token_sets`); None: all


def _next_token(
    logits: jax.Array,
    drawn: Drawn,
    heads: tuple[jax.Array, ...],
    *,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The `TokenLoss` of log-likelihoods, of logits divided by the temperature."""
    targets = drawn.ids
    logits, nll, normalizer = _predict(_offered(logits, drawn, temperature), targets)
    hits = _hits(targets, logits).astype(jnp.float32)
    return nll, _divided(jnp.exp(logits - normalizer[..., None]) - hits, temperature)


def _divided(x: jax.Array, temperature: float) -> jax.Array:
    return x if temperature == 1 else x / temperature


def _offered(logits: jax.Array, drawn: Drawn, temperature: float) -> jax.Array:
    """Returns the logits that tokens were drawn by: minus infinity for ids that were cut off."""
    logits = _divided(logits, temperature)
    if drawn.kept is None:
        return logits
    return jnp.where(token_sets.unpack(drawn.kept, logits.shape[-1]), logits, -jnp.inf)


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
    drawn = Drawn(targets_BT, None)
    return weighted_loss(_next_token, hidden_BTD, w_DV, drawn, weights_BT, policy, chunk)


@jax.named_scope("head")
def weighted_loss(
    loss: TokenLoss,
    hidden_BTD: jax.Array,
    w_DV: jax.Array,
    known_BTX: Any,
    weights_BT: jax.Array,
    policy: Policy,
    chunk: int,
    heads: tuple[jax.Array, ...] = (),
) -> jax.Array:
    """Sums weight times loss over the tokens; the other arguments are those of `weighted_nll`.

    Args:
      loss: is given a chunk's logits, its part of `known_BTX` and `heads`, and must be a pure
        function of them.
      known_BTX: a tree of arrays [B, T, ...], such as targets or a teacher's hidden states, through
        which no gradient flows.
      heads: weights of further heads, [D, V] each, such as a teacher's, without gradient; `loss`
        gets them in the compute type.

    Returns:
      float32 scalar.
    """
    hidden, known, weights = jax.tree.map(split_length, (hidden_BTD, known_BTX, weights_BT))
    width = _width(weights, chunk)
    return _weighted_loss(hidden, w_DV, known, weights, heads, loss, policy, width)


def token_nll(
    hidden_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, policy: Policy, chunk: int
) -> jax.Array:
    """Returns the negative log-likelihood of each target, float32 [B, T], in nats; the arguments
    are those of `weighted_nll`.
    """
    return token_nll_and_entropy(hidden_BTD, w_DV, targets_BT, policy, chunk)[0]


@jax.named_scope("head")
def token_nll_and_entropy(
    hidden_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    policy: Policy,
    chunk: int,
    temperature: float = 1.0,
    kept_BTX: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the values of `token_nll`, and the entropy of each prediction over the vocabulary,
    float32 [B, T], in nats. No gradient flows through the entropy.

    Args:
      temperature: what the logits are divided by, as when tokens are drawn.
      kept_BTX: uint32, sets of the ids among which each target was drawn (`token_sets`), over which
        the prediction is renormalized. A token whose set lacks the target has no finite values.
    """
    hidden, drawn = jax.tree.map(split_length, (hidden_BTD, Drawn(targets_BT, kept_BTX)))
    width = _width(drawn.ids, chunk)
    found = _token_nll(hidden, w_DV, drawn, policy, width, temperature)
    nll, entropy = cast("tuple[jax.Array, jax.Array]", found)
    return join_length(nll), join_length(jax.lax.stop_gradient(entropy))


def token_scores(
    hidden_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, policy: Policy, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the values of `token_nll`, and whether each target is the likeliest token, bool
    [B, T]. Cannot be differentiated.
    """

    def score(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _predict(logits, targets).nll, logits.argmax(axis=-1) == targets

    return map_logits(score, hidden_BTD, w_DV, targets_BT, policy, chunk)


@jax.named_scope("head")
def map_logits(
    function: Callable[[jax.Array, Any], Any],
    hidden_BTD: jax.Array,
    w_DV: jax.Array,
    known_BTX: Any,
    policy: Policy,
    chunk: int,
) -> Any:
    """Applies a function to the logits of each chunk, float32 [..., V], and its part of
    `known_BTX`, a tree of arrays [B, T, ...]. Its values, a tree of arrays [..., X], come back as
    [B, T, X]. Cannot be differentiated.
    """
    hidden, known = jax.tree.map(split_length, (hidden_BTD, known_BTX))
    width = _width(hidden[..., 0], chunk)
    return jax.tree.map(join_length, _map_chunks(function, hidden, w_DV, known, policy, width))


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


def _head_weight(w_DV: Weight, policy: Policy) -> jax.Array:
    def gather(leaf: jax.Array) -> jax.Array:
        return gather_for_use(leaf, ("embed", "vocab"), policy.travels(leaf.dtype))

    return at_use(jax.tree.map(gather, w_DV), policy.compute)


def _cut(x: jax.Array, width: int) -> jax.Array:
    """Reshapes [B, T, ...] to [chunks, B, width, ...]; zeros fill the last chunk."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % width)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, width, *x.shape[2:]).swapaxes(0, 1)


def _join(x: jax.Array, length: int) -> jax.Array:
    """Undoes `_cut`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def _map_chunks(function, hidden_BTD, w_DV, known_BTX, policy, width):
    weight = _head_weight(w_DV, policy)
    chunks = jax.tree.map(lambda x: _cut(x, width), (hidden_BTD.astype(policy.compute), known_BTX))
    values = jax.lax.map(
        lambda chunk: function(vocabulary_logits(chunk[0], weight, policy), chunk[1]), chunks
    )
    return jax.tree.map(lambda x: _join(x, hidden_BTD.shape[1]), values)


def _weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
    # Selected as well as multiplied: 0 times infinity is not 0.
    return jnp.where(weights != 0, weights * values, 0.0)


def _weighted_chunks(hidden_BTD, known_BTX, weights_BT, policy, width):
    whole = (hidden_BTD.astype(policy.compute), known_BTX, weights_BT)
    return jax.tree.map(lambda x: _cut(x, width), whole)


def _sum_and_gradients(hidden_BTD, w_DV, known_BTX, weights_BT, heads, loss, policy, width):
    """Returns the weighted sum and its gradients with respect to hidden states and head."""
    weight, *heads = (_head_weight(w, policy) for w in (w_DV, *heads))

    def step(carry, chunk):
        total, dw_DV = carry
        hidden, known, weights = chunk
        values, dlogits = loss(vocabulary_logits(hidden, weight, policy), known, tuple(heads))
        dlogits = _weigh(weights[..., None], dlogits).astype(policy.compute)
        dhidden = jnp.matmul(dlogits, weight.T, preferred_element_type=policy.compute)
        chunk_dw_DV = jnp.tensordot(
            hidden, dlogits, ((0, 1), (0, 1)), preferred_element_type=jnp.float32
        )
        # Summed directly into each device's part: the whole is the largest array of all.
        dw_DV += reduce_to_shards(chunk_dw_DV, "embed", "vocab")
        return (total + _weigh(weights, values).sum(), dw_DV), dhidden

    start = (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
    chunks = _weighted_chunks(hidden_BTD, known_BTX, weights_BT, policy, width)
    (total, dw_DV), dhidden = jax.lax.scan(step, start, chunks)
    return total, _join(dhidden, weights_BT.shape[1]).astype(hidden_BTD.dtype), dw_DV


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _weighted_loss(hidden_BTD, w_DV, known_BTX, weights_BT, heads, loss, policy, width):
    weight, *heads = (_head_weight(w, policy) for w in (w_DV, *heads))

    def step(total, chunk):
        hidden, known, weights = chunk
        values, _ = loss(vocabulary_logits(hidden, weight, policy), known, tuple(heads))
        return total + _weigh(weights, values).sum(), None

    chunks = _weighted_chunks(hidden_BTD, known_BTX, weights_BT, policy, width)
    return jax.lax.scan(step, jnp.float32(0), chunks)[0]


def _weighted_loss_forward(*arguments):
    total, *gradients = _sum_and_gradients(*arguments)
    return total, gradients


def _weighted_loss_backward(loss, policy, width, gradients, cotangent):
    dhidden_BTD, dw_DV = gradients
    dhidden_BTD = dhidden_BTD * cotangent.astype(dhidden_BTD.dtype)
    return dhidden_BTD, dw_DV * cotangent, None, None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_nll(hidden_BTD, w_DV, drawn_BT, policy, width, temperature):
    def values(logits, drawn):
        logits, nll, normalizer = _predict(_offered(logits, drawn, temperature), drawn.ids)
        # The entropy is log sum exp minus the mean of the logits; 0 times -inf is no part of it.
        shares = jnp.exp(logits - normalizer[..., None])
        return nll, normalizer - jnp.where(shares > 0, shares * logits, 0.0).sum(axis=-1)

    return _map_chunks(values, hidden_BTD, w_DV, drawn_BT, policy, width)


def _token_nll_forward(hidden_BTD, w_DV, drawn_BT, policy, width, temperature):
    both = _token_nll(hidden_BTD, w_DV, drawn_BT, policy, width, temperature)
    return both, (hidden_BTD, w_DV, drawn_BT)


def _token_nll_backward(policy, width, temperature, residuals, cotangents):
    hidden_BTD, w_DV, drawn_BT = residuals
    cotangent_BT, _ = cotangents
    loss = functools.partial(_next_token, temperature=temperature)
    # The gradient of a function of these values is that of their sum weighted by its cotangents.
    _, dhidden_BTD, dw_DV = _sum_and_gradients(
        hidden_BTD, w_DV, drawn_BT, cotangent_BT, (), loss, policy, width
    )
    return dhidden_BTD, dw_DV, None


_token_nll.defvjp(_token_nll_forward, _token_nll_backward)

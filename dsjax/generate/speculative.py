"""Speculative decoding: the model's own MTP modules guess the next tokens, one pass of the main
model checks all the guesses, and what comes out is distributed as if it had drawn each token.

With J modules, a step drafts J tokens, gives the newest token and the drafts to the main model
together, and keeps a beginning of the drafts and one token more: 1 to J + 1 tokens a step. Letters
of this file: J drafts, W = J + 1 positions of a window.

Exactness (Leviathan et al., arXiv:2211.17192, section 2.3). A draft drawn from q is kept with
probability min(1, p / q), p being the main model's distribution; the first that is not kept is
replaced by a draw from max(p - q, 0), renormalised, and after the last draft comes a draw from p,
which is the same rule with q = 0. Both p and q are what the row's settings leave of the logits, so
a greedy row (p and q are one at a token) keeps drafts as long as they are the likeliest tokens.
Drafts, tests and replacements have random numbers of their own, given by the row's seed and the
position (so a seed gives another text than without speculation, of the same distribution); one
that went into a draft after the first that is dropped has shown nowhere, and serves again.

Exact means: with respect to the logits of this pass over W tokens. A pass over one token adds in
another order and differs in the last bits, so two tokens whose logits differ by less than that may
change places; in bfloat16 this happens now and then, as it does between batch sizes.

Positions. Let n be the position of the newest token, which no layer has run. Module k at position i
reads the state of position i of module k - 1 (the main model for k = 1) and token i + k, and
predicts token i + k + 1. All modules draft at position n - 1, the last whose main state is known:
module k reads draft k - 1 there (the newest token for k = 1) and drafts token n + k. In its cache,
the entry of position i rests on token i + k, which is known up to i = n - k; entries after that
rest on drafts and must be made anew when these turn out otherwise. Every step therefore runs each
module on the W positions n - W ... n - 1. What it leaves behind is right: let position j be in the
window of this step and not of the next, whose newest token stands at m, so j < m - W, and m - n - 1
drafts were kept. Its token j + k is known or, where j + k > n, among the kept drafts, since
j + k < m - W + k <= m - 1. The main model needs no such care: its next pass starts at m and so
writes over the entries of all drafts that were not kept.

Cost. While reading weights bounds a step, J more tokens cost little, and the gain is the number of
tokens kept: V3 (arXiv:2412.19437, section 5.4.3) keeps 85 to 90 % of the drafts of its one module
and decodes 1.8 times as fast. Two things cost more. A token in a mixture of experts brings its own
experts: at batch 1, V3's second token reads up to 20.4B more weights beside the 36.6B of the first,
at batch 64 the tokens choose 222 of 256 experts already and twice as many choose 252. And where
arithmetic bounds a step (large batches), each dropped draft is work for nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.config import ModelConfig
from dsjax.generate.record import NOTHING, Record, Wanted, record
from dsjax.generate.sampling import Knobs, greedy, probabilities
from dsjax.model.cache import Cache
from dsjax.model.transformer import Extended, Transformer

# Random numbers of one row and position, by use.
_DRAFT, _TEST, _REPLACE = range(3)


class State(NamedTuple):
    """Where decoding stands: J modules, windows of W = J + 1."""

    cache: Cache
    position_B: jax.Array  # int32, of the newest token, which no layer has run
    tokens_BW: jax.Array  # int32, the newest tokens; 0 where there are none yet
    hidden_BWD: jax.Array  # what the first module reads of the position before each of them


class Drafts(NamedTuple):
    """Guesses at the tokens after the newest one."""

    tokens_BJ: jax.Array  # int32
    q_BJV: jax.Array  # float32, what each was drawn from
    cache: Cache


class Step(NamedTuple):
    """What a step adds."""

    state: State
    tokens_BW: jax.Array  # int32, of which a row's first `n_new_B` count
    n_new_B: jax.Array  # int32
    n_kept_B: jax.Array  # int32, drafts that the main model kept
    record: Record  # of `tokens_BW`


def check(config: ModelConfig) -> None:
    """Raises ValueError if the model has nothing to draft with."""
    if not config.n_mtp:
        raise ValueError(
            "speculative decoding drafts with MTP modules and this model has none (n_mtp=0); "
            "decode without it, or use a checkpoint that has them"
        )


def slide(window: jax.Array, new: jax.Array, counts_B: jax.Array) -> jax.Array:
    """Moves each row's window over its first `counts_B` new entries: [B, W, ...], [B, T, ...] ->
    [B, W, ...], the newest last.
    """
    joined = jnp.concatenate([window, new], axis=1)
    return _take(joined, counts_B[:, None] + _count(window.shape[1])[None])


def prefill(
    model: Transformer,
    tokens_BX: jax.Array,
    starts_B: jax.Array,
    counts_B: jax.Array,
    extended: Extended,
    hidden_BWD: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Runs the MTP modules over a chunk of prompts that the main model has just run.

    Args:
      tokens_BX: int32 [B, T + J]; the chunk, and the J tokens after it, which its last positions
        read. What a row's prompt no longer has may be anything: these are positions of the first
        draft's window.
      starts_B: int32 position of each row's first token in the chunk.
      counts_B: int32 how many of the chunk's T tokens are a row's own.
      extended: what `Transformer.extend` returned for the chunk.
      hidden_BWD: the window up to the chunk; zeros before the first.

    Returns:
      the cache, and the window up to the last of each row's own tokens.
    """
    hidden_BTD, cache = extended.mtp_input_BTD, extended.cache
    T = hidden_BTD.shape[1]
    for depth in range(model.config.n_mtp):
        ahead_BT = tokens_BX[:, depth + 1 :][:, :T]
        hidden_BTD, _, cache = model.extend_mtp(depth, ahead_BT, hidden_BTD, starts_B, cache)
    return cache, slide(hidden_BWD, extended.mtp_input_BTD, counts_B)


def step(
    model: Transformer,
    state: State,
    knobs: Knobs,
    most_B: jax.Array,
    wanted: Wanted = NOTHING,
) -> Step:
    """Adds one to J + 1 tokens to each row.

    Args:
      state: its cache has room for J tokens after the newest.
      most_B: int32, how many tokens a row may still add; one with 0 stays where it is.
    """
    return verify(model, state, draft(model, state, knobs), knobs, most_B, wanted)


def draft(model: Transformer, state: State, knobs: Knobs) -> Drafts:
    """Runs every MTP module on the window before the newest token, each after its forerunner's
    draft.
    """
    W = state.tokens_BW.shape[1]
    # Near the beginning of a text some of the window's positions would be negative. Its entries
    # move up then, and those of no position stand after the last, where they are soon replaced.
    lacking_B = jnp.maximum(W - state.position_B, 0)
    starts_B = state.position_B - W + lacking_B
    order_BW = (_count(W)[None] + lacking_B[:, None]) % W
    known_BX, q = state.tokens_BW, []
    hidden_BWD, cache = _take(state.hidden_BWD, order_BW), state.cache
    for depth in range(model.config.n_mtp):
        tokens_BW = _take(known_BX[:, depth:], order_BW)
        hidden_BWD, normed_BWD, cache = model.extend_mtp(
            depth, tokens_BW, hidden_BWD, starts_B, cache
        )
        last_B1D = _take(normed_BWD, (W - 1 - lacking_B)[:, None])
        q_BV = probabilities(model.logits(last_B1D)[:, 0], knobs)
        draft_B = _draw(q_BV, knobs, _DRAFT, state.position_B + depth + 1)
        known_BX = jnp.concatenate([known_BX, draft_B[:, None]], axis=1)
        q.append(q_BV)
    return Drafts(known_BX[:, W:], jnp.stack(q, axis=1), cache)


def verify(
    model: Transformer,
    state: State,
    drafts: Drafts,
    knobs: Knobs,
    most_B: jax.Array,
    wanted: Wanted = NOTHING,
) -> Step:
    """Runs the main model on the newest token and the drafts, and moves on by what it keeps and one
    token more.
    """
    given_BW = jnp.concatenate([state.tokens_BW[:, -1:], drafts.tokens_BJ], axis=1)
    extended = model.extend(
        given_BW, state.position_B, drafts.cache, routing=wanted.experts
    )
    logits_BWV = model.logits(extended.main_BTD)
    each = Knobs(*(jnp.repeat(field, given_BW.shape[1], axis=0) for field in knobs))
    p_XV = probabilities(logits_BWV.reshape(-1, logits_BWV.shape[-1]), each)
    tokens_BW, n_kept_B = choose(
        drafts.tokens_BJ, drafts.q_BJV, p_XV.reshape(logits_BWV.shape), knobs, state.position_B
    )
    n_new_B = jnp.minimum(n_kept_B + 1, most_B)
    state = State(
        extended.cache,
        state.position_B + n_new_B,
        slide(state.tokens_BW, tokens_BW, n_new_B),
        slide(state.hidden_BWD, extended.mtp_input_BTD, n_new_B),
    )
    report = record(wanted, logits_BWV, tokens_BW, knobs, extended.experts_LBTK)
    return Step(state, tokens_BW, n_new_B, n_kept_B, report)


def choose(
    drafts_BJ: jax.Array,
    q_BJV: jax.Array,
    p_BWV: jax.Array,
    knobs: Knobs,
    position_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Decides which drafts stay and what comes after them.

    Args:
      drafts_BJ: int32.
      q_BJV: float32, what each was drawn from.
      p_BWV: float32, the main model's distributions after the newest token and after each draft.
      position_B: int32, of the newest token.

    Returns:
      int32 [B, W] tokens, a row's drafts that stay and then the one after them; and how many stay,
      int32 [B].
    """
    J = drafts_BJ.shape[1]

    def of_drafts(distributions: jax.Array) -> jax.Array:
        return jnp.take_along_axis(distributions, drafts_BJ[..., None], axis=-1)[..., 0]

    positions_BJ = position_B[:, None] + 1 + _count(J)[None]
    keys_BJ = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(_stream(knobs, _TEST), positions_BJ)
    uniform_BJ = jax.vmap(jax.vmap(jax.random.uniform))(keys_BJ)
    stays_BJ = uniform_BJ * of_drafts(q_BJV) < of_drafts(p_BWV[:, :J])
    n_kept_B = jnp.cumprod(stays_BJ.astype(jnp.int32), axis=1).sum(axis=1)
    q_BWV = jnp.pad(q_BJV, ((0, 0), (0, 1), (0, 0)))
    p_BV, q_BV = (_take(x, n_kept_B[:, None])[:, 0] for x in (p_BWV, q_BWV))
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # Where p and q agree, a draft goes by rounding alone and nothing may be left.
    rest_BV = jnp.where(rest_BV.sum(axis=-1, keepdims=True) > 0, rest_BV, p_BV)
    next_B = _draw(rest_BV, knobs, _REPLACE, position_B + 1 + n_kept_B)
    stays_BW = _count(J + 1)[None] < n_kept_B[:, None]
    padded_BW = jnp.pad(drafts_BJ, ((0, 0), (0, 1)))
    return jnp.where(stays_BW, padded_BW, next_B[:, None]), n_kept_B


def _draw(weights_BV: jax.Array, knobs: Knobs, use: int, positions_B: jax.Array) -> jax.Array:
    """Draws a token for each row in proportion to the weights, int32 [B]."""

    def draw() -> jax.Array:
        keys_B = jax.vmap(jax.random.fold_in)(_stream(knobs, use), positions_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, weights_BV.shape[-1:]))(keys_B)
        return greedy(jnp.log(weights_BV) + noise_BV)

    return jax.lax.cond(jnp.any(knobs.temperature_B > 0), draw, lambda: greedy(weights_BV))


def _stream(knobs: Knobs, use: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(knobs.keys_B, use)


def _take(x: jax.Array, index_BX: jax.Array) -> jax.Array:
    """Each row's entries along the second dimension: [B, T, ...] -> [B, X, ...]."""
    return jnp.take_along_axis(x, index_BX.reshape(*index_BX.shape, *[1] * (x.ndim - 2)), axis=1)


def _count(n: int) -> jax.Array:
    return jnp.arange(n, dtype=jnp.int32)

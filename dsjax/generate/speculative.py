"""Speculative decoding: the model's MTP modules draft the next tokens and one pass of the main
model verifies them, such that the output is distributed as if the main model had drawn every token.

With J modules, a step drafts J tokens, runs the main model on the newest token and the drafts
together, and accepts a prefix of the drafts plus one more token: 1 to J + 1 tokens per step.
Letters of this file: J drafts, W = J + 1 positions of a window.

Exactness (Leviathan et al., arXiv:2211.17192, section 2.3). Let q be the distribution that a draft
was drawn from and p the main model's. The draft is accepted with probability min(1, p / q). The
first rejected draft is replaced by a draw from max(p - q, 0), renormalised; if all are accepted,
one more token is drawn from p, which is the same rule with q = 0. Both p and q include the row's
sampling settings, so in a greedy row (one-hot p and q) drafts are accepted as long as they are the
most likely tokens. Drafts, tests and replacements use separate random streams, keyed by the row's
seed and the position. Hence a seed gives different text than without speculation, with the same
distribution. The numbers behind a draft after the first rejection may be reused: they have not
influenced the output.

Exact is meant with respect to the logits of this pass over W tokens. A pass over one token sums in
another order and differs in the last bits, so two tokens whose logits differ by less than that may
swap. In bfloat16 this happens occasionally, as it does between batch sizes.

Positions. Let n be the position of the newest token, which no layer has processed. Module k at
position i reads the state of module k - 1 at position i (of the main model for k = 1) and token i +
k, and predicts token i + k + 1. All modules draft at position n - 1, the last one whose main state
is known: module k reads draft k - 1 there (the newest token for k = 1) and drafts token n + k.

In its cache, the entry of position i depends on token i + k, which is known for i <= n - k; later
entries depend on drafts and must be recomputed if these are rejected. Every step therefore runs
each module on the W positions n - W ... n - 1.

Invariant: when a position leaves the window, its entry is final. Proof, for a position j in this
step's window but not in the next, whose newest token is at m:
  - j < m - W, and m - n - 1 drafts were accepted;
  - if j + k <= n, token j + k was already known;
  - otherwise it is an accepted draft, since j + k < m - W + k <= m - 1.
The main model needs no such window: its next pass starts at m and overwrites the entries of all
rejected drafts.

Cost. As long as reading the weights bounds a step, J more tokens cost little and the speed-up is
the number of accepted tokens: V3 (arXiv:2412.19437, section 5.4.3) accepts 85 to 90 % of the drafts
of its one module and decodes 1.8 times as fast. Two effects cost more. In a mixture of experts
every token activates its own experts: at batch 1, V3's second token reads up to 20.4B more weights
beside the 36.6B of the first; at batch 64 the tokens already choose 222 of 256 experts, and twice
as many tokens choose 252. And where arithmetic bounds a step (large batches), each rejected draft
is wasted work.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.config import ModelConfig
from dsjax.generate.record import NOTHING, Record, Wanted, record
from dsjax.generate.sampling import Knobs, greedy, probabilities, repeated
from dsjax.model.cache import Cache
from dsjax.model.transformer import Extended, Transformer

# Random streams of one row and position.
_DRAFT, _TEST, _REPLACE = range(3)


class State(NamedTuple):
    """State of decoding with J modules and windows of W = J + 1."""

    cache: Cache
    position_B: jax.Array  # int32, of the newest token, which no layer has processed
    tokens_BW: jax.Array  # int32, the newest tokens; 0 before the start of the text
    hidden_BWD: jax.Array  # the first module's input state at the position before each of them


class Drafts(NamedTuple):
    """Proposals for the tokens after the newest one."""

    tokens_BJ: jax.Array  # int32
    q_BJV: jax.Array  # float32, the distribution each was drawn from
    cache: Cache


class Step(NamedTuple):
    """The result of a step."""

    state: State
    tokens_BW: jax.Array  # int32; the first `n_new_B` of a row are valid
    n_new_B: jax.Array  # int32
    n_kept_B: jax.Array  # int32, accepted drafts
    record: Record  # report on `tokens_BW`
    experts_LBTK: jax.Array | None  # int32, that the main model chose; if asked for or counted


def check(config: ModelConfig) -> None:
    """Raises ValueError if the model has no MTP modules to draft with."""
    if not config.n_mtp:
        raise ValueError(
            "speculative decoding drafts with MTP modules and this model has none (n_mtp=0); "
            "decode without it, or use a checkpoint that has them"
        )


def slide(window: jax.Array, new: jax.Array, counts_B: jax.Array) -> jax.Array:
    """Advances each row's window [B, W, ...] by its first `counts_B` entries of [B, T, ...], the
    newest last.
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
    """Runs the MTP modules on a chunk of prompts that the main model has just run.

    Args:
      tokens_BX: int32 [B, T + J]; the chunk and the J tokens after it, which its last positions
        read. Values beyond the end of a prompt do not matter: the first step recomputes these
        positions.
      starts_B: int32 position of each row's first token in the chunk.
      counts_B: int32, how many of the chunk's T tokens belong to the row's prompt.
      extended: the result of `Transformer.extend` for the chunk.
      hidden_BWD: the window before the chunk; zeros before the first.

    Returns:
      the cache, and the window up to the last prompt token of each row.
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
      state: its cache must have room for J tokens after the newest.
      most_B: int32, how many tokens each row may still add; a row with 0 does not advance.
    """
    return verify(model, state, draft(model, state, knobs), knobs, most_B, wanted)


def draft(model: Transformer, state: State, knobs: Knobs) -> Drafts:
    """Runs the MTP modules in order on the window before the newest token, each reading the draft
    of the one before.
    """
    W = state.tokens_BW.shape[1]
    # Near the start of a text some window positions would be negative. The window is rotated then:
    # entries without a position move behind the last one, where a later step overwrites them.
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
    """Runs the main model on the newest token and the drafts, and advances by the accepted drafts
    and one more token.
    """
    given_BW = jnp.concatenate([state.tokens_BW[:, -1:], drafts.tokens_BJ], axis=1)
    routing = wanted.experts or model.redundant
    extended = model.extend(given_BW, state.position_B, drafts.cache, routing=routing)
    logits_BWV = model.logits(extended.main_BTD)
    each = repeated(knobs, given_BW.shape[1])
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
    return Step(state, tokens_BW, n_new_B, n_kept_B, report, extended.experts_LBTK)


def choose(
    drafts_BJ: jax.Array,
    q_BJV: jax.Array,
    p_BWV: jax.Array,
    knobs: Knobs,
    position_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Decides which drafts are accepted and draws the token after them.

    Args:
      drafts_BJ: int32.
      q_BJV: float32, the distribution each was drawn from.
      p_BWV: float32, the main model's distributions after the newest token and after each draft.
      position_B: int32, of the newest token.

    Returns:
      int32 [B, W] tokens, the accepted drafts of a row followed by one more; and the number of
      accepted drafts, int32 [B].
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
    # Where p equals q, only rounding can reject a draft, and the difference may be all zeros.
    rest_BV = jnp.where(rest_BV.sum(axis=-1, keepdims=True) > 0, rest_BV, p_BV)
    next_B = _draw(rest_BV, knobs, _REPLACE, position_B + 1 + n_kept_B)
    stays_BW = _count(J + 1)[None] < n_kept_B[:, None]
    padded_BW = jnp.pad(drafts_BJ, ((0, 0), (0, 1)))
    return jnp.where(stays_BW, padded_BW, next_B[:, None]), n_kept_B


def _draw(weights_BV: jax.Array, knobs: Knobs, use: int, positions_B: jax.Array) -> jax.Array:
    """Draws a token per row in proportion to the weights, int32 [B]."""

    def draw() -> jax.Array:
        keys_B = jax.vmap(jax.random.fold_in)(_stream(knobs, use), positions_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, weights_BV.shape[-1:]))(keys_B)
        return greedy(jnp.log(weights_BV) + noise_BV)

    return jax.lax.cond(jnp.any(knobs.temperature_B > 0), draw, lambda: greedy(weights_BV))


def _stream(knobs: Knobs, use: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(knobs.keys_B, use)


def _take(x: jax.Array, index_BX: jax.Array) -> jax.Array:
    """Gathers each row's entries along the second dimension: [B, T, ...] -> [B, X, ...]."""
    return jnp.take_along_axis(x, index_BX.reshape(*index_BX.shape, *[1] * (x.ndim - 2)), axis=1)


def _count(n: int) -> jax.Array:
    return jnp.arange(n, dtype=jnp.int32)

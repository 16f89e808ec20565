"""The compiled functions of generation: a chunk of prompts, a few decoding steps, row insertion.

They take the carry, which stays on the devices, and return it updated. All other state is a few
numbers per row, which the host keeps between calls. The newest token of a row is the last one
drawn, which no layer has processed yet.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.generate import speculative, unattended
from dsjax.generate.record import NOTHING, Record, Wanted, record
from dsjax.generate.sampling import Knobs, biased, greedy, sample
from dsjax.generate.speculative import State, Step
from dsjax.model import token_sets
from dsjax.model.cache import Cache, empty_cache
from dsjax.model.transformer import Embeddings, Transformer
from dsjax.parallel.routing_plan import count
from dsjax.parallel.sharding import constrain

MAX_STEPS = 16  # per call of `decode`


class Carry(NamedTuple):
    """The large state; W = D + 1 with D drafts per step, 1 without drafts."""

    cache: Cache
    hidden_BWD: jax.Array  # see `speculative.State`; zeros without drafts


class Drawn(NamedTuple):
    """What a call of `prefill` returns to the host, for X requests."""

    tokens_X: jax.Array  # int32, the first new token of each
    record: Record  # report on it
    load_LE: Any = None  # see `load`


class Decoded(NamedTuple):
    """What a call of `decode` returns to the host; N = MAX_STEPS. Steps that did not run add
    nothing.
    """

    position_B: jax.Array  # int32, position of each row's newest token
    recent_BW: jax.Array  # int32, the newest tokens
    left_B: jax.Array  # int32, how many tokens a row may still add
    n_steps: jax.Array  # int32 scalar, steps that ran
    tokens_NBW: jax.Array  # int32, the tokens that each step added; -1 is none
    ran_NB: jax.Array  # bool, whether the row was unfinished at that step
    n_kept_NB: jax.Array  # int32, drafts that the main model kept
    record_N: Record  # report on `tokens_NBW`, with a leading dimension of steps
    load_LE: Any = None  # see `load`

    def rows(self) -> list[tuple[list[int], Record]]:
        """Returns each row's n new tokens and the report on them, arrays [n, ...]."""
        new_BNW = np.swapaxes(self.tokens_NBW, 0, 1) >= 0

        def picked(array_NBWX: Any) -> np.ndarray:
            return np.swapaxes(array_NBWX, 0, 1)[new_BNW]

        tokens, report = picked(self.tokens_NBW).tolist(), jax.tree.map(picked, self.record_N)
        ends = np.cumsum(new_BNW.sum(axis=(1, 2))).tolist()
        return [
            (tokens[a:b], Record(*(None if each is None else each[a:b] for each in report)))
            for a, b in itertools.pairwise([0, *ends])
        ]


def empty_carry(model: Transformer, *, batch: int, length: int, n_drafts: int) -> Carry:
    """Allocates an empty carry for rows of up to `length` tokens."""
    config, dtype = model.config, model.policy.compute
    hidden_BWD = jnp.zeros((batch, n_drafts + 1, config.dim), dtype)
    cache = empty_cache(config, batch, length, dtype, mtp=n_drafts > 0, separate=model.separate)
    return _pinned(Carry(cache, hidden_BWD))


def prefill(
    model: Transformer,
    carry: Carry,
    tokens_BX: jax.Array,
    starts_B: jax.Array,
    lengths_B: jax.Array,
    rows_X: jax.Array,
    knobs: Knobs,
    embeddings: Embeddings | None = None,
    *,
    wanted: Wanted = NOTHING,
) -> tuple[Carry, Drawn]:
    """Runs one chunk of every row's prompt, and draws a token for each of X requests.

    Args:
      tokens_BX: int32 [B, T + D], the chunk and the D tokens after it; prompts are padded at the
        end.
      starts_B: int32 position of each chunk's first token.
      lengths_B: int32 lengths of the prompts; 0 for a row that has nothing to run.
      rows_X: int32, the row of each request's prompt. Requests may share a prompt.
      knobs: of the requests.
      embeddings: replace those of some of the T tokens.

    Returns:
      the carry, and the first new token of each request with a report on it, in which are the
      experts of all rows' T tokens [B, T, L, K]. Token and log-probabilities are valid only for
      requests whose prompt ends in this chunk.
    """
    n_drafts = carry.hidden_BWD.shape[1] - 1
    T = tokens_BX.shape[1] - n_drafts
    routing = wanted.experts or model.redundant
    extended = model.extend(
        tokens_BX[:, :T], starts_B, carry.cache, routing=routing, embeddings=embeddings
    )
    cache, hidden_BWD = extended.cache, carry.hidden_BWD
    if n_drafts:
        counts_B = jnp.clip(lengths_B - starts_B, 0, T)
        cache, hidden_BWD = speculative.prefill(
            model, tokens_BX, starts_B, counts_B, extended, hidden_BWD
        )
    index_B11 = jnp.clip(lengths_B - 1 - starts_B, 0, T - 1)[:, None, None]
    last_B1D = jnp.take_along_axis(extended.main_BTD, index_B11, axis=1)
    logits_X1V = model.logits(last_B1D)[rows_X]
    drawn_X = sample(logits_X1V[:, 0], knobs, lengths_B[rows_X])
    report = record(wanted, logits_X1V, drawn_X[:, None], knobs, extended.experts_LBTK)
    own_BT = jnp.arange(T, dtype=jnp.int32)[None] < (lengths_B - starts_B)[:, None]
    drawn = Drawn(drawn_X, report, load(model, extended.experts_LBTK, own_BT))
    return _pinned(Carry(cache, hidden_BWD)), drawn


def load(
    model: Transformer, experts_LBTK: jax.Array | None, counted_BT: jax.Array
) -> jax.Array | None:
    """Counts the tokens of each MoE layer's experts, int32 [L, E]; None without redundant experts,
    which it is for.

    Args:
      counted_BT: bool, or [B, 1]: which tokens belong to a request.
    """
    if not model.redundant:
        return None
    assert experts_LBTK is not None
    E = model.config.n_routed_experts
    counted_LBTK = jnp.where(counted_BT[None, :, :, None], experts_LBTK, E)
    return jax.vmap(lambda experts_BTK: count(experts_BTK, E))(counted_LBTK)


def insert(
    model: Transformer, carry: Carry, other: Carry, others_X: jax.Array, rows_X: jax.Array
) -> Carry:
    """Copies rows of another carry, whose cache is at most as long, over rows of this one.

    Args:
      others_X: int32, the rows of `other` to copy; one row may be copied to several places.
      rows_X: int32, the row that each copy replaces, all different; a row outside this carry drops
        the copy.
    """
    del model
    hidden_BWD = carry.hidden_BWD.at[rows_X].set(other.hidden_BWD[others_X], mode="drop")
    return _pinned(Carry(carry.cache.insert(rows_X, other.cache, others_X), hidden_BWD))


def decode(
    model: Transformer,
    carry: Carry,
    position_B: jax.Array,
    recent_BW: jax.Array,
    left_B: jax.Array,
    stop_ids_BX: jax.Array,
    knobs: Knobs,
    most_steps: jax.Array | None,
    enough: jax.Array,
    *,
    wanted: Wanted = NOTHING,
) -> tuple[Carry, Decoded]:
    """Runs up to `most_steps` decoding steps, fewer if all rows finish earlier.

    Args:
      left_B: int32, how many tokens each row may still add; a row with 0 does not advance.
      most_steps: int32 scalar. None runs MAX_STEPS, whatever `enough` says and although all rows
        may finish earlier, and takes every row's most likely token, which must be what `knobs` say.
        A GPU would otherwise wait in every step for the host to read whether there is another one,
        and whether any row draws.
      stop_ids_BX: int32; a row finishes when it draws one of its stop ids. Padded with -1.
      enough: int32 scalar; returns as soon as no more than this many rows are unfinished, such as
        one less than now because a request waits for a row.
    """
    W = recent_BW.shape[1]
    advance = speculative.step if W > 1 else functools.partial(_step, likeliest=most_steps is None)

    def body(loop: tuple[Carry, Decoded]) -> tuple[Carry, Decoded]:
        carry, past = loop
        state = State(carry.cache, past.position_B, past.recent_BW, carry.hidden_BWD)
        step = advance(model, state, knobs, past.left_B, wanted)
        new_BW = jnp.arange(W, dtype=jnp.int32)[None] < step.n_new_B[:, None]
        stops_BW = (step.tokens_BW[:, :, None] == stop_ids_BX[:, None]).any(axis=-1) & new_BW
        # The stop id itself is kept; accepted drafts after it are dropped.
        stops_before_BW = jnp.cumsum(stops_BW, axis=1) - stops_BW.astype(jnp.int32)
        new_BW = new_BW & (stops_before_BW == 0)
        left_B = past.left_B - new_BW.sum(axis=1, dtype=jnp.int32)
        index, ran_B = past.n_steps, past.left_B > 0
        n_kept_B = jnp.where(ran_B, step.n_kept_B, 0)
        decoded = Decoded(
            step.state.position_B,
            step.state.tokens_BW,
            jnp.where(stops_BW.any(axis=1), 0, left_B),
            index + 1,
            past.tokens_NBW.at[index].set(jnp.where(new_BW, step.tokens_BW, -1)),
            past.ran_NB.at[index].set(ran_B),
            past.n_kept_NB.at[index].set(n_kept_B),
            jax.tree.map(lambda all_, new: all_.at[index].set(new), past.record_N, step.record),
            jax.tree.map(jnp.add, past.load_LE, load(model, step.experts_LBTK, ran_B[:, None])),
        )
        return _pinned(Carry(step.state.cache, step.state.hidden_BWD)), decoded

    B = position_B.shape[0]
    nothing = Decoded(
        position_B,
        recent_BW,
        left_B,
        jnp.int32(0),
        jnp.full((MAX_STEPS, B, W), -1, jnp.int32),
        jnp.zeros((MAX_STEPS, B), bool),
        jnp.zeros((MAX_STEPS, B), jnp.int32),
        _empty_record(model, B, W, wanted),
        jnp.zeros((model.config.n_moe_layers, model.config.n_routed_experts), jnp.int32)
        if model.redundant
        else None,
    )
    if most_steps is None and W == 1 and unattended.reports_enough(model, knobs, wanted):
        return _unattended(model, carry, nothing, stop_ids_BX)
    if most_steps is None:
        return jax.lax.fori_loop(0, MAX_STEPS, lambda _, loop: body(loop), (carry, nothing))

    def goes_on(loop: tuple[Carry, Decoded]) -> jax.Array:
        n_unfinished = (loop[1].left_B > 0).sum(dtype=jnp.int32)
        return (loop[1].n_steps < most_steps) & (n_unfinished > enough)

    return jax.lax.while_loop(goes_on, body, (carry, nothing))


def _unattended(
    model: Transformer, carry: Carry, start: Decoded, stop_ids_BX: jax.Array
) -> tuple[Carry, Decoded]:
    """Runs MAX_STEPS steps, of which all that is reported follows from their tokens."""
    rows = unattended.Rows(start.position_B, start.recent_BW[:, 0], start.left_B)
    cache, rows, tokens_NB = unattended.run(model, carry.cache, rows, stop_ids_BX, MAX_STEPS)
    decoded = start._replace(
        position_B=rows.position_B,
        recent_BW=rows.token_B[:, None],
        left_B=rows.left_B,
        n_steps=jnp.int32(MAX_STEPS),
        tokens_NBW=tokens_NB[:, :, None],
        ran_NB=tokens_NB >= 0,
    )
    return _pinned(Carry(cache, carry.hidden_BWD)), decoded


def _step(
    model: Transformer,
    state: State,
    knobs: Knobs,
    most_B: jax.Array,
    wanted: Wanted,
    *,
    likeliest: bool,
) -> Step:
    """Runs each row's newest token and draws the next; the counterpart of `speculative.step`."""
    routing = wanted.experts or model.redundant
    extended = model.extend(state.tokens_BW, state.position_B, state.cache, routing=routing)
    logits_B1V = model.logits(extended.main_BTD)
    drawn_B = (
        greedy(biased(logits_B1V[:, 0], knobs))
        if likeliest
        else sample(logits_B1V[:, 0], knobs, state.position_B + 1)
    )
    n_new_B = jnp.minimum(most_B, 1)
    tokens_B1 = jnp.where(n_new_B[:, None] > 0, drawn_B[:, None], state.tokens_BW)
    state = State(extended.cache, state.position_B + n_new_B, tokens_B1, state.hidden_BWD)
    report = record(wanted, logits_B1V, drawn_B[:, None], knobs, extended.experts_LBTK)
    no_drafts_B = jnp.zeros_like(n_new_B)
    return Step(state, drawn_B[:, None], n_new_B, no_drafts_B, report, extended.experts_LBTK)


def _empty_record(model: Transformer, B: int, W: int, wanted: Wanted) -> Record:
    """Allocates the reports of MAX_STEPS steps."""
    logprobs = jnp.zeros((MAX_STEPS, B, W), jnp.float32) if wanted.logprobs else None
    config = model.config
    shape = (MAX_STEPS, B, W, config.n_moe_layers, config.n_activated_experts)
    experts = jnp.zeros(shape, jnp.int32) if wanted.experts else None
    sets_shape = (MAX_STEPS, B, W, token_sets.n_words(config.vocab_size))
    sets = jnp.zeros(sets_shape, jnp.uint32) if wanted.kept else None
    top = (MAX_STEPS, B, W, min(wanted.top, config.vocab_size))
    top_ids = jnp.zeros(top, jnp.int32) if wanted.top else None
    top_logprobs = jnp.zeros(top, jnp.float32) if wanted.top else None
    return Record(logprobs, logprobs, experts, sets, top_ids, top_logprobs)


def _pinned(carry: Carry) -> Carry:
    """Lays the carry out identically in every program, so that no call reshards it."""
    return Carry(carry.cache.pinned(), constrain(carry.hidden_BWD, "batch", "tokens", "width"))

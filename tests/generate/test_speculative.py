"""Speculative decoding: what it puts out is the main model's, what it drafts the MTP modules'."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import ModelConfig
from dsjax.generate import sampling, speculative
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.model.cache import Cache, empty_cache
from dsjax.model.transformer import Extended
from tests.closeness import LOGITS, assert_close
from tests.model.tiny import TINY, tiny_model

# Of one kind of layer each, for quick compilation.
CONFIG = dataclasses.replace(TINY, n_layers=2, n_dense_layers=0, n_mtp=2)
DENSE = dataclasses.replace(TINY, n_layers=2, n_dense_layers=2, n_mtp=1)
LENGTH = 128  # of the cache
CHUNK = 4  # tokens of a prompt that run at once
STEPS = 36
PROMPTS = [list(range(3, 14)), [7], [50, 20, 80, 11], [33, 9, 2, 60, 61, 62], [12, 13]]
ROWS = [Sampling(0), Sampling(0), Sampling(seed=5), Sampling(0.7, top_k=8, seed=6), Sampling(0)]


@functools.cache
def drafting_model(config):
    """A model whose MTP modules are right now and then: its next token hangs mostly on the last
    one, and its modules see that through an `eh_proj` and a norm like the main model's.
    """
    model = jax.tree.map(lambda leaf: leaf, tiny_model(config))
    model.embed.weight = model.embed.weight.copy(5 * model.embed.weight[...])
    eh_proj = np.array(model.mtp.eh_proj[...])
    eh_proj[:, : config.dim] = np.eye(config.dim)
    model.mtp.eh_proj = model.mtp.eh_proj.copy(jnp.asarray(eh_proj))
    norm = np.tile(model.norm.weight[...], (config.n_mtp, 1))
    model.mtp.norm.weight = model.mtp.norm.weight.copy(jnp.asarray(norm))
    return model


class Decoded(NamedTuple):
    """Each row's tokens with the prompt, and what each step did, steps first."""

    tokens: list[list[int]]
    drafts: np.ndarray  # [steps, B, J]
    q: np.ndarray  # [steps, B, J, V]
    positions: np.ndarray  # [steps, B], of the newest token before the step
    new: np.ndarray  # [steps, B]
    kept: np.ndarray  # [steps, B]


@jax.jit
def prefill_chunk(model, tokens_BX, starts_B, counts_B, cache, hidden_BWD):
    extended = model.extend(tokens_BX[:, :CHUNK], starts_B, cache)
    cache, hidden_BWD = speculative.prefill(
        model, tokens_BX, starts_B, counts_B, extended, hidden_BWD
    )
    return cache, hidden_BWD, model.logits(extended.main_BTD)


def prefill(model, prompts, knobs):
    """Runs prompts in chunks that rows end in at different places, and draws the next tokens."""
    B, W = len(prompts), model.config.n_mtp + 1
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.full((B, LENGTH), 95, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = empty_cache(model.config, B, LENGTH, jnp.float32, mtp=True)
    hidden = np.zeros((B, W, model.config.dim), np.float32)
    logits = []
    for start in range(0, lengths.max(), CHUNK):
        chunk = padded[:, start : start + CHUNK + W - 1]
        starts, counts = np.full(B, start, np.int32), np.clip(lengths - start, 0, CHUNK)
        cache, hidden, chunk_logits = prefill_chunk(model, chunk, starts, counts, cache, hidden)
        logits.append(np.asarray(chunk_logits))
    last = np.concatenate(logits, axis=1)[np.arange(B), lengths - 1]
    first = np.asarray(jax.jit(sampling.sample)(last, knobs, lengths)).tolist()
    newest = [[*[0] * W, *prompt, token][-W:] for prompt, token in zip(prompts, first, strict=True)]
    return speculative.State(cache, lengths, np.array(newest, np.int32), hidden)


@jax.jit
def draft_and_verify(model, state, knobs, most_B):
    drafts = speculative.draft(model, state, knobs)
    return drafts, speculative.verify(model, state, drafts, knobs, most_B)


def decode(model, prompts, rows, *, most=1000, steps=STEPS):
    knobs = sampling.knobs(rows)
    state = prefill(model, prompts, knobs)
    newest = np.asarray(state.tokens_BW)[:, -1].tolist()
    tokens = [[*prompt, token] for prompt, token in zip(prompts, newest, strict=True)]
    ends = np.array([len(prompt) + most for prompt in prompts], np.int32)
    seen = []
    for _ in range(steps):
        left = ends - np.array([len(row) for row in tokens], np.int32)
        drafts, step = draft_and_verify(model, state, knobs, left)
        add(tokens, step)
        made = (drafts.tokens_BJ, drafts.q_BJV, state.position_B, step.n_new_B, step.n_kept_B)
        seen.append([np.asarray(array) for array in made])
        state = step.state
    return Decoded(tokens, *(np.stack(arrays) for arrays in zip(*seen, strict=True)))


def add(tokens, step):
    counts = np.asarray(step.n_new_B).tolist()
    for row, new, count in zip(tokens, np.asarray(step.tokens_BW).tolist(), counts, strict=True):
        row.extend(new[:count])


@functools.cache
def decoded():
    return decode(drafting_model(CONFIG), PROMPTS, ROWS)


@jax.jit
def training_forward(model, tokens_BT):
    hidden = model.hidden(tokens_BT)
    return model.logits(hidden.main_BTD), jax.vmap(model.logits)(hidden.mtp_DBTD)


def forward(model, rows):
    """Logits of the training forward: main [B, T, V] and MTP [J, B, T, V]."""
    padded = np.zeros((len(rows), LENGTH), np.int32)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return [np.asarray(logits) for logits in training_forward(model, padded)]


@pytest.mark.heavy
def test_greedy_tokens_are_those_of_plain_decoding():
    """Each is the likeliest after those before it; no two logits are near enough to be swapped."""
    found = decoded()
    main, _ = forward(drafting_model(CONFIG), found.tokens)
    greedy = [row for row, options in enumerate(ROWS) if options.temperature == 0]
    assert min(len(found.tokens[row]) - len(PROMPTS[row]) for row in greedy) > 40
    for row in greedy:
        start, tokens = len(PROMPTS[row]), found.tokens[row]
        logits = main[row, start - 1 : len(tokens) - 1]
        highest = np.sort(logits, axis=-1)
        assert (highest[:, -1] - highest[:, -2]).min() > 1e-4
        assert logits.argmax(axis=-1).tolist() == tokens[start:]


def test_some_drafts_are_kept_and_rows_advance_by_themselves():
    found = decoded()
    rate = found.kept.mean(axis=0) / 2
    assert (rate > 0.05).all() and (rate < 0.95).all(), rate
    assert (found.new == found.kept + 1).all()
    assert (found.new.min(axis=1) < found.new.max(axis=1)).any()
    assert {*found.kept.ravel().tolist()} == {0, 1, 2}


def test_drafts_are_those_of_the_training_forward():
    """Over the text so far and the drafts, which shows every hidden state and cache entry that is
    wrong or left over.
    """
    found, model = decoded(), drafting_model(CONFIG)
    probabilities = jax.jit(jax.vmap(sampling.probabilities, (0, None)))
    for step, ends in enumerate(found.positions):
        rows = [
            [*tokens[: end + 1], *drafts]
            for tokens, end, drafts in zip(found.tokens, ends, found.drafts[step], strict=True)
        ]
        _, mtp = forward(model, rows)
        logits = mtp[:, np.arange(len(rows)), ends - 1]  # [J, B, V]
        want = np.swapaxes(probabilities(logits, sampling.knobs(ROWS)), 0, 1)
        assert_close(found.q[step], want, LOGITS, f"q of step {step}")
        assert (np.take_along_axis(found.q[step], found.drafts[step][..., None], axis=-1) > 0).all()


def test_draws_depend_on_their_own_row_only():
    """The same requests in other rows, beside neighbours that advance otherwise."""
    order = [3, 2, 2, 0, 3]
    model = drafting_model(CONFIG)
    found = decode(model, [PROMPTS[i] for i in order], [ROWS[i] for i in order], steps=12)
    for row, i in enumerate(order):
        assert found.tokens[row] == decoded().tokens[i][: len(found.tokens[row])]


def test_a_row_adds_no_more_than_it_may():
    found = decode(drafting_model(CONFIG), PROMPTS, ROWS, most=6, steps=8)
    for prompt, tokens, whole in zip(PROMPTS, found.tokens, decoded().tokens, strict=True):
        assert tokens == whole[: len(prompt) + 6]


def test_slide_keeps_the_newest():
    window, new = jnp.asarray([[1, 2, 3]] * 4), jnp.asarray([[4, 5, 6, 7]] * 4)
    found = speculative.slide(window, new, jnp.asarray([0, 1, 3, 4]))
    assert found.tolist() == [[1, 2, 3], [2, 3, 4], [4, 5, 6], [5, 6, 7]]


class Chain(NamedTuple):
    """A model whose next token hangs on the last one alone, and its MTP modules: probabilities."""

    p_VV: jax.Array
    q_JVV: jax.Array
    redundant = False

    @property
    def config(self) -> ModelConfig:
        return dataclasses.replace(TINY, vocab_size=len(self.p_VV), n_mtp=len(self.q_JVV))

    def extend(self, tokens_BT, starts_B, cache, *, routing):
        logits_BTV = jnp.log(self.p_VV)[tokens_BT]
        return Extended(logits_BTV, logits_BTV, cache, None)

    def extend_mtp(self, depth, tokens_BT, hidden_BTD, starts_B, cache):
        return hidden_BTD, jnp.log(self.q_JVV)[depth][tokens_BT], cache

    def logits(self, logits_BTV):
        return logits_BTV


speculative_step = jax.jit(speculative.step)
P = np.array([[0.5, 0.3, 0.2], [0.2, 0.1, 0.7], [0.15, 0.6, 0.25]], np.float32)
Q = np.array(
    [
        [[0.1, 0.2, 0.7], [0.6, 0.4, 0.0], [0.3, 0.4, 0.3]],
        [[0.2, 0.7, 0.1], [0.0, 0.1, 0.9], [0.5, 0.0, 0.5]],
    ],
    np.float32,
)
N = 8_000
# What 26 degrees of freedom exceed once in a million times.
UNLIKELY = 77.0


def chain_texts(p, q, *, steps, temperature=1.0):
    """Texts after token 0 from N seeds, and the drafts that were kept [steps, N]."""
    model, knobs = Chain(p, q), sampling.knobs([Sampling(temperature, seed=s) for s in range(N)])
    window = np.zeros((N, len(q) + 1), np.int32)
    hidden = np.zeros((N, len(q) + 1, len(p)), np.float32)
    state = speculative.State(Cache(None, None, None), np.full(N, 9, np.int32), window, hidden)
    texts, kept = [[] for _ in range(N)], []
    for _ in range(steps):
        step = speculative_step(model, state, knobs, np.full(N, 1000, np.int32))
        add(texts, step)
        kept.append(np.asarray(step.n_kept_B))
        state = step.state
    return texts, np.array(kept)


def chi_square(texts, p):
    """Pearson's statistic of the first three tokens against the product of their probabilities."""
    triples = np.array([text[:3] for text in texts])
    counts = np.zeros((3, 3, 3))
    np.add.at(counts, tuple(triples.T), 1)
    wanted = N * np.einsum("a,ab,bc->abc", p[0], p, p, dtype=np.float64)
    assert wanted.min() > 5
    return float(np.sum((counts - wanted) ** 2 / wanted))


def test_texts_are_distributed_as_the_main_model_says():
    """From drafts that are mostly wrong, some impossible for the next module."""
    texts, kept = chain_texts(P, Q, steps=3)
    assert chi_square(texts, P) < UNLIKELY
    # Negative control: the statistic sees a difference of 0.06.
    near = P + np.array([[0.06, -0.06, 0.0], [0.0] * 3, [0.0] * 3], np.float32)
    assert chi_square(texts, near) > UNLIKELY
    # As many drafts stay as can: the overlap of p and q.
    overlap = np.minimum(P[0], Q[0, 0]).sum()
    assert abs((kept[0] > 0).mean() - overlap) < 5 * (0.25 / N) ** 0.5


def test_drafts_of_the_main_distribution_all_stay():
    texts, kept = chain_texts(P, np.stack([P, P]), steps=1)
    assert (kept == 2).all()
    assert chi_square(texts, P) < UNLIKELY


def test_greedy_texts_are_exact_whatever_is_drafted():
    texts, kept = chain_texts(P, np.stack([P, Q[0]]), steps=2, temperature=0)
    # The first module always drafts what the main model wants, the second wants 2, 0, 0, 1 ...
    assert all(text[:4] == [0, 0, 0, 0] for text in texts)
    assert (kept == 1).all()


def generate(engine, requests):
    texts = [[] for _ in requests]
    for item in engine.generate(requests):
        for text, new in zip(texts, item, strict=True):
            text.extend(new)
    return texts


@functools.cache
def engine():
    return Engine(drafting_model(DENSE), speculative=True, prefill_chunk=16)


LONG = [list(range(20, 37)), [7], list(range(40, 56)), [3, 1, 4, 1, 5]]
MOST = [44, 14, 22, 30]  # new tokens; where a row ends early, its next draft would be kept


@functools.cache
def long_texts():
    requests = [
        Request(tuple(prompt), most, Sampling(0)) for prompt, most in zip(LONG, MOST, strict=True)
    ]
    return generate(engine(), requests), engine().statistics


@pytest.mark.heavy
def test_engine_generates_greedily_what_the_training_forward_says_and_counts_its_drafts():
    """Prompts end within, at and after the end of a chunk; rows that have ended do not count."""
    texts, statistics = long_texts()
    assert [len(text) for text in texts] == MOST
    main, mtp = forward(drafting_model(DENSE), [p + t for p, t in zip(LONG, texts, strict=True)])
    steps = kept = 0
    for row, (prompt, text) in enumerate(zip(LONG, texts, strict=True)):
        tokens, newest = prompt + text, len(prompt)
        assert main[row].argmax(axis=-1)[newest - 1 : len(tokens) - 1].tolist() == text
        drafts = mtp[0, row].argmax(axis=-1)
        while newest < len(tokens) - 1:
            wanted = main[row, newest].argmax()
            stays = drafts[newest - 1] == wanted
            steps, kept, newest = steps + 1, kept + int(stays), newest + 1 + int(stays)
        end = len(tokens) - 1
        assert MOST[row] == max(MOST) or drafts[end - 1] == main[row, end].argmax()
    assert (statistics.decode_steps, statistics.drafted, statistics.accepted) == (
        steps,
        steps,
        kept,
    )
    assert statistics.new_tokens == sum(MOST)
    assert 0.1 < kept / steps < 0.9


@pytest.mark.heavy
def test_engine_cuts_after_a_stop_id_and_at_the_most_tokens():
    """At any place, so also between a draft that is kept and the token after it."""
    whole, _ = long_texts()
    for most in range(1, 9):
        stops = [frozenset({text[most - 1]}) for text in whole]
        limited = [Request(tuple(prompt), most, Sampling(0)) for prompt in LONG]
        stopped = [
            Request(tuple(prompt), 44, Sampling(0), stop)
            for prompt, stop in zip(LONG, stops, strict=True)
        ]
        assert generate(engine(), limited) == [text[:most] for text in whole]
        want = [text[: text.index(text[most - 1]) + 1] for text in whole]
        assert generate(engine(), stopped) == want
        assert engine().statistics.new_tokens == sum(map(len, want))


def test_engine_rejects_a_model_without_modules():
    message = r"none \(n_mtp=0\); decode without it, or use a checkpoint that has them"
    with pytest.raises(ValueError, match=message):
        Engine(tiny_model(dataclasses.replace(DENSE, n_mtp=0)), speculative=True)

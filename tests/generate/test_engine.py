"""Generation against the model run again for each token, and what a request may ask for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.generate import decoding
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.model.parameters import shardings
from dsjax.parallel.mesh import make_mesh
from tests.model.tiny import TINY, tiny_model

GREEDY = Sampling(temperature=0.0)
# Prompts that end in the third chunk of 16, in the first, at the end of one and at once.
PROMPTS = [tuple(range(3, 43)), (50, 20, 80), tuple(range(60, 76)), (7,)]
MOST = [9, 20, 4, 0]


def requests(sampling=GREEDY, most=MOST, **options):
    return [
        Request(prompt, count, sampling, **options)
        for prompt, count in zip(PROMPTS, most, strict=True)
    ]


def run(engine, requests):
    """Each row's tokens, and how many items they came in."""
    rows = [[] for _ in requests]
    items = 0
    for item in engine.generate(requests):
        items += 1
        for row, new in zip(rows, item, strict=True):
            row += new
    return rows, items


@functools.cache
def engine(speculative=False):
    return Engine(tiny_model(), speculative=speculative, prefill_chunk=16)


@functools.cache
def recomputed():
    """Greedy tokens of the whole forward pass, for every prompt."""
    forward = jax.jit(lambda model, rows: model(rows))
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(max(MOST)):
        padded = np.zeros((len(rows), 64), np.int32)
        for padded_row, row in zip(padded, rows, strict=True):
            padded_row[: len(row)] = row
        logits = np.asarray(forward(tiny_model(), padded))
        for row, row_logits in zip(rows, logits, strict=True):
            row.append(int(row_logits[len(row) - 1].argmax()))
    return [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]


def wanted():
    return [row[:most] for row, most in zip(recomputed(), MOST, strict=True)]


@pytest.mark.parametrize("speculative", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_greedy_tokens_are_those_of_full_recomputation(speculative):
    got, items = run(engine(speculative), requests())
    assert got == wanted()
    assert items > 2  # they come while the rest is on its way
    statistics = engine(speculative).statistics
    assert statistics.prompt_tokens == sum(map(len, PROMPTS))
    assert statistics.new_tokens == sum(MOST)
    assert statistics.prefill_seconds > 0 and statistics.decode_seconds > 0
    n_drafts = TINY.n_mtp if speculative else 0
    assert statistics.drafted == n_drafts * statistics.decode_steps
    assert 0 <= statistics.accepted <= statistics.drafted
    # The first token of each of three rows comes with the prompt.
    plain = sum(MOST) - 3
    assert statistics.decode_steps == plain if not speculative else statistics.decode_steps <= plain


@pytest.mark.heavy
def test_model_on_a_mesh_generates_the_same():
    mesh = make_mesh({"data": 2, "tensor": 2}, n_devices=4)
    spread = Engine(jax.device_put(tiny_model(), shardings(tiny_model(), mesh)), prefill_chunk=16)
    got, _ = run(spread, requests()[:3])  # three rows over two devices
    assert got == wanted()[:3]


def test_each_program_is_compiled_once_for_a_bucket(monkeypatch):
    """Other prompts, limits, settings and stop ids of the same sizes need no new program."""
    compiled = []
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self: compiled.append(self) or compile_(self)
    )
    fresh = Engine(tiny_model(), prefill_chunk=16)
    run(fresh, requests())
    assert len(compiled) == 3  # an empty cache, chunks of 16 (the last one is filled up), decoding
    sampled = requests(Sampling(0.8, top_k=5, seed=3), [5, 3, 11, 30], stop_ids=frozenset({9}))
    run(fresh, [sampled[1], sampled[0], sampled[3], sampled[2]])
    assert len(compiled) == 3


def test_stop_id_ends_its_row_and_is_its_last_token():
    first, second, *_ = wanted()
    rows = requests()
    rows[0] = Request(PROMPTS[0], MOST[0], GREEDY, frozenset({first[0]}))
    rows[1] = Request(PROMPTS[1], MOST[1], GREEDY, frozenset({second[7], TINY.vocab_size - 1}))
    got, _ = run(engine(), rows)
    assert got[0] == first[:1]
    assert got[1] == second[: second.index(second[7]) + 1]
    assert got[2] == wanted()[2]


def test_a_draw_depends_on_the_row_alone():
    rows = [
        Request(prompt, 8, Sampling(seed=seed))
        for prompt, seed in [(PROMPTS[0], 5), (PROMPTS[1], 5), (PROMPTS[1], 6), (PROMPTS[1], 5)]
    ]
    forward, _ = run(engine(), rows)
    backward, _ = run(engine(), rows[::-1])
    assert forward == backward[::-1]
    assert forward[1] == forward[3] != forward[2]


def test_bfloat16_model_keeps_a_bfloat16_cache():
    model = tiny_model(compute=jnp.bfloat16)
    carry = jax.eval_shape(lambda: decoding.empty_carry(model, 2, 256, 0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(carry)} == {"bfloat16"}


def test_cache_fits_the_request_in_few_sizes():
    """Powers of two from 256 on, and never more than what the model's longest text needs."""
    lengths = [engine()._cache_length(needed) for needed in (3, 256, 257, 2048, 2049, 4096)]
    assert lengths == [256, 256, 512, 2048, 4096, 4096]
    assert engine(True)._cache_length(4096) == 4096 + 16  # drafts stand beyond the end


def test_nothing_asked_for_is_nothing_done():
    assert list(engine().generate([])) == []
    assert run(engine(), requests(most=[0, 0, 0, 0]))[0] == [[], [], [], []]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 1), "request 1: an empty prompt has no next token; start with"),
        (
            Request((3, 96, -1), 1),
            "request 1: token 96 at place 1 of the prompt is not in the vocabulary of 96; use the",
        ),
        (
            Request((1,) * 4000, 97),
            r"request 1: a prompt of 4000 tokens and max_new_tokens=97 exceed "
            r"model.max_seq_len=4096; shorten the prompt",
        ),
    ],
    ids=["empty", "vocabulary", "length"],
)
def test_request_that_the_model_cannot_serve_is_refused_at_once(request_, message):
    with pytest.raises(ValueError, match=message):
        engine().generate([Request((1,), 1), request_])


def test_all_refused_requests_are_named():
    with pytest.raises(ValueError, match=r"request 0: an empty(.|\n)*request 1: token 200"):
        engine().generate([Request((), 1), Request((200,), 1)])


def test_negative_limit_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens=-1 must not be negative"):
        Request((1,), -1)


@pytest.mark.parametrize(("chunk", "near"), [(0, 16), (8, 16), (100, 128)])
def test_chunk_must_be_a_power_of_two(chunk, near):
    with pytest.raises(ValueError, match=f"={chunk} must be a power .* 16 on, such as {near}"):
        Engine(tiny_model(), prefill_chunk=chunk)

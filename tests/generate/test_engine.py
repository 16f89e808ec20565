"""Generation against the model run again for each token, and what a request may ask for."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.generate import decoding
from dsjax.generate.engine import Engine, Request
from dsjax.generate.programs import Programs
from dsjax.generate.request import Given, join
from dsjax.generate.sampling import Sampling
from dsjax.kernels import sparse_attention
from dsjax.model.parameters import shardings
from dsjax.model.transformer import Embeddings
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
@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"pipe": 2}], ids=str)
def test_model_on_a_mesh_generates_the_same(sizes):
    mesh = make_mesh(sizes, n_devices=math.prod(sizes.values()))
    spread = Engine(jax.device_put(tiny_model(), shardings(tiny_model(), mesh)), prefill_chunk=16)
    got, _ = run(spread, requests()[:3])  # three rows over two devices
    assert got == wanted()[:3]


INDEXED = {"index_n_heads": 16, "index_head_dim": 8, "index_topk": 24}
GROUPED = {"attention": "gqa", "n_kv_heads": 2, "head_dim": 8, "qk_norm": True, "n_mtp": 0}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, {"context": 4, "data": 2}),
        # Key heads that tensor does not divide.
        pytest.param(GROUPED, {"context": 2, "tensor": 4}, marks=pytest.mark.slow),
        pytest.param(INDEXED, {"context": 2, "expert": 2, "fsdp": 2}, marks=pytest.mark.slow),
        (INDEXED | {"n_mtp": 0}, {"context": 4, "tensor": 2}),
    ],
    ids=str,
)
def test_a_cache_split_over_devices_generates_the_same(changes, sizes, monkeypatch):
    """Prompts that end in the middle of a part, with drafts and known prefixes; texts longer than
    what an indexer chooses, and than what it scores at once.
    """
    monkeypatch.setattr(sparse_attention, "_MOST_PRODUCTS", {"cpu": 2**11})
    monkeypatch.setattr(sparse_attention, "_FEWEST_KEYS", 16)
    config = dataclasses.replace(TINY, **changes)
    model, mesh = tiny_model(config), make_mesh(sizes, n_devices=math.prod(sizes.values()))
    asked = [
        Request(
            tuple(np.random.default_rng(n).integers(0, 96, n).tolist()), 20, GREEDY, logprobs=True
        )
        for n in (5, 33, 70)
    ]
    options = {"speculative": config.n_mtp > 0, "prefill_chunk": 16, "prefix_tokens": 256}
    spread = Engine(jax.device_put(model, shardings(model, mesh)), **options)
    want = Engine(model, **options).complete(asked)
    for again in (False, True):
        got = spread.complete(asked)
        assert bool(spread.statistics.cached_tokens) == again
        assert [each.tokens for each in got] == [each.tokens for each in want]
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(mine.report.logprobs, theirs.report.logprobs, rtol=1e-5)


def test_each_device_holds_its_share_of_a_split_cache():
    for count in (2, 4):
        mesh = make_mesh({"context": count, "data": 2}, n_devices=2 * count)
        model = jax.device_put(tiny_model(), shardings(tiny_model(), mesh))
        empty = Programs(model).compiled(decoding.empty_carry, batch=4, length=256, n_drafts=2)
        for entry in jax.tree.leaves(empty().cache):
            (share,) = {shard.data.nbytes for shard in entry.addressable_shards}
            assert share * 2 * count == entry.nbytes


def test_a_cache_that_cannot_be_split_is_refused():
    grouped = {"attention": "nsa", "n_kv_heads": 2, "head_dim": 8, "n_mtp": 0}
    model = tiny_model(dataclasses.replace(TINY, **grouped))
    mesh = make_mesh({"context": 2}, n_devices=2)
    with pytest.raises(
        ValueError, match=r"model\.attention=nsa keeps its cache whole: .* mesh\.context=2 devices"
    ):
        Engine(jax.device_put(model, shardings(model, mesh)))


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
    carry = jax.eval_shape(lambda: decoding.empty_carry(model, batch=2, length=256, n_drafts=0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(carry)} == {"bfloat16"}


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
    with pytest.raises(
        ValueError, match=f"={chunk} must be a power .* at least 16, such as {near}"
    ):
        Engine(tiny_model(), prefill_chunk=chunk)


# A crowd for two rows: requests of unlike lengths, limits and settings, more than run together.
CROWD = [
    Request(tuple(range(3, 43)), 9, GREEDY),
    Request((50, 20, 80), 20, Sampling(seed=5)),
    Request(tuple(range(60, 76)), 1, GREEDY),
    Request((7,), 0, GREEDY),
    Request((7,), 30, GREEDY),
    Request(tuple(range(9, 26)), 12, Sampling(0.8, top_k=20, seed=6)),
    Request((1, 2) * 20, 5, GREEDY),
]


@functools.cache
def alone(speculative=False):
    return [engine(speculative).complete([request])[0] for request in CROWD]


def drive(engine, arrivals, *, leave=(), leave_begun=()):
    """Adds requests at the given steps, cancels some at others or at their first tokens; the
    outputs of each, joined."""
    ids, parts = {}, {}
    for step in range(200):
        for request, arrives in arrivals:
            if arrives == step:
                ids[engine.add(request)] = request
        for id, leaves in leave:
            if leaves == step:
                engine.cancel(id)
        for id, new in engine.step().items():
            parts.setdefault(id, []).append(new)
            if id in leave_begun:  # how many tokens a later step gives is up to the clock
                engine.cancel(id)
        if not engine.busy and step > max(arrives for _, arrives in arrivals):
            break
    assert not engine.busy
    return {id: (ids[id], join(found)) for id, found in parts.items()}


@pytest.mark.parametrize("arrivals", ["together", "spread", "late"])
@pytest.mark.parametrize("speculative", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_a_request_gets_the_same_tokens_in_any_company(speculative, arrivals):
    when = {"together": [0] * 7, "spread": [0, 1, 2, 3, 5, 8, 9], "late": [0, 0, 40, 2, 2, 41, 3]}
    crowded = Engine(tiny_model(), speculative=speculative, prefill_chunk=16, max_batch=2)
    found = drive(crowded, list(zip(CROWD, when[arrivals], strict=True)))
    got = {request: (output.tokens, output.finish) for request, output in found.values()}
    assert len(found) == len(CROWD)
    for request, wanted in zip(CROWD, alone(speculative), strict=True):
        assert got[request] == (wanted.tokens, wanted.finish)


def test_a_cancelled_request_leaves_its_row_to_the_next():
    """One while it waits, one while its prompt runs, one among the rows that run."""
    crowded = Engine(tiny_model(), prefill_chunk=16, max_batch=2)
    arrivals = [(request, 0) for request in CROWD]
    found = drive(crowded, arrivals, leave=[(7, 1), (1, 2)], leave_begun=[2])
    assert 1 not in found and 7 not in found and found[2][1].finish is None
    for id in (3, 4, 5, 6):
        assert found[id][1].tokens == alone()[id - 1].tokens
    partial = found[2][1].tokens
    assert 0 < len(partial) < 20 and partial == alone()[1].tokens[: len(partial)]


def test_a_longer_request_makes_the_running_cache_longer():
    short, long = CROWD[1], Request(tuple(range(3, 43)) * 6, 40, GREEDY)
    wanted = [engine().complete([request])[0].tokens for request in (short, long)]
    found = drive(engine(), [(short, 0), (long, 3)])
    assert [output.tokens for _, output in sorted_outputs(found)] == wanted


def sorted_outputs(found):
    return [found[id] for id in sorted(found)]


@pytest.mark.heavy
def test_requests_join_and_leave_on_a_mesh():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, n_devices=8)
    spread = jax.device_put(tiny_model(), shardings(tiny_model(), mesh))
    crowded = Engine(spread, prefill_chunk=16, max_batch=4)
    arrivals = zip(CROWD, [0, 0, 1, 1, 4, 5, 6], strict=True)
    for request, output in drive(crowded, list(arrivals)).values():
        assert output.tokens == alone()[CROWD.index(request)].tokens


def test_a_batch_of_limited_size_serves_any_number_of_requests():
    limited = Engine(tiny_model(), prefill_chunk=16, max_batch=3)
    found = limited.complete(CROWD)
    assert [output.tokens for output in found] == [output.tokens for output in alone()]
    assert [len(output.tokens) for output in found] == [r.max_new_tokens for r in CROWD]
    assert limited.statistics.new_tokens == sum(request.max_new_tokens for request in CROWD)


def test_rows_that_run_go_on_while_a_long_prompt_comes():
    """No more than one chunk of it between two calls of the decoding program."""
    busy = Engine(tiny_model(), prefill_chunk=16, max_batch=2)
    first = busy.add(Request((7,), 200, GREEDY))
    while not busy.step():
        pass
    second = busy.add(Request((1, 2) * 40, 3, GREEDY))  # five chunks
    steps = []
    while second not in (new := busy.step()):
        steps.append(first in new)
    assert steps.count(False) == 4 and (False, False) not in list(itertools.pairwise(steps))


def test_a_short_prompt_does_not_wait_for_a_long_one_that_came_with_it():
    own = Engine(tiny_model(), prefill_chunk=16, max_batch=2)
    short, long = own.add(CROWD[1]), own.add(Request((1, 2) * 40, 3, GREEDY))
    tokens = []
    while long not in (new := own.step()):
        tokens += new[short].tokens if short in new else []
    assert len(tokens) > 3 and tokens == alone()[1].tokens[: len(tokens)]
    own.cancel(short)
    own.cancel(long)


def test_generation_left_early_leaves_nothing_behind():
    rows = requests()
    for _ in engine().generate(rows):
        break
    assert not engine().busy
    assert run(engine(), rows)[0] == wanted()


def test_generation_needs_the_engine_for_itself():
    id = engine().add(CROWD[0])
    with pytest.raises(ValueError, match="other requests are unfinished; step or cancel them"):
        next(engine().generate(requests()))
    engine().cancel(id)
    engine().cancel(id)  # no longer open
    assert not engine().busy and engine().step() == {}


def test_batch_must_have_room():
    with pytest.raises(ValueError, match="max_batch=0 must be at least 1; None sets no limit"):
        Engine(tiny_model(), max_batch=0)


def test_a_request_that_is_added_is_checked():
    with pytest.raises(ValueError, match="token 96 at place 0 of the prompt is not in the"):
        engine().add(Request((96,), 1))


def test_without_readers_the_same_tokens_take_fewer_calls():
    asked = requests(Sampling(seed=3)) * 2
    calls, found = [], []
    for streaming in (True, False):
        engine = Engine(tiny_model(), max_batch=2, streaming=streaming)
        found.append([output.tokens for output in engine.complete(asked)])
        ids = [engine.add(request) for request in asked]
        calls.append(0)
        while engine.busy:
            engine.step()
            calls[-1] += 1
        assert len(ids) == len(asked)
    assert found[0] == found[1] and calls[1] < calls[0]


# Two prompts, one in chunks, of several requests each: their own seeds, settings and limits.
SHARING = [
    Request(PROMPTS[place], most, sampling, stop_ids, logprobs=True, experts=True)
    for place, most, sampling, stop_ids in [
        (0, 9, Sampling(seed=1), frozenset()),
        (1, 20, Sampling(seed=2), frozenset(range(8))),
        (0, 5, GREEDY, frozenset()),
        (0, 0, GREEDY, frozenset()),
        (1, 12, Sampling(0.8, top_k=20, seed=3), frozenset()),
        (0, 9, Sampling(seed=4), frozenset(range(60))),
    ]
]


@functools.cache
def sharing_alone(speculative):
    return [engine(speculative).complete([request])[0] for request in SHARING]


def assert_equal_outputs(found, wanted):
    for output, own in zip(found, wanted, strict=True):
        assert (output.tokens, output.finish) == (own.tokens, own.finish)
        for name in ("logprobs", "sampled_logprobs"):
            got, want = getattr(output.report, name), getattr(own.report, name)
            np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_array_equal(np.sort(output.report.experts), np.sort(own.report.experts))


@pytest.mark.parametrize("speculative", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_equal_prompts_run_once_and_change_nothing(speculative):
    wanted = sharing_alone(speculative)
    assert_equal_outputs(engine(speculative).complete(SHARING), wanted)
    assert engine(speculative).statistics.prompt_tokens == len(PROMPTS[0]) + len(PROMPTS[1])


@pytest.mark.heavy
def test_equal_prompts_run_once_where_rows_are_few():
    few = Engine(tiny_model(), prefill_chunk=16, max_batch=3)
    assert_equal_outputs(few.complete(SHARING), sharing_alone(False))
    ran = few.statistics.prompt_tokens
    assert ran < sum(len(request.prompt) for request in SHARING)


@pytest.mark.slow
@pytest.mark.parametrize("speculative", [pytest.param(False, marks=pytest.mark.slow), True])
def test_equal_prompts_run_once_on_a_mesh(speculative):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, n_devices=8)
    spread = jax.device_put(tiny_model(), shardings(tiny_model(), mesh))
    own = Engine(spread, speculative=speculative, prefill_chunk=16)
    assert_equal_outputs(own.complete(SHARING), sharing_alone(speculative))
    assert own.statistics.prompt_tokens == len(PROMPTS[0]) + len(PROMPTS[1])


DENSE = dataclasses.replace(TINY, n_layers=1, n_dense_layers=1, n_mtp=0)
# Most end early, a few go on for long.
UNEVEN = [
    Request(PROMPTS[1 + number % 2], most, Sampling(seed=number), logprobs=True)
    for number, most in enumerate([3, 5, 9, 40, 7, 4, 6, 8] * 8)
]


def decoded_rows(monkeypatch):
    """Lists the rows of each call of the decoding program."""
    rows = []
    decode = decoding.Decoded.rows
    monkeypatch.setattr(
        decoding.Decoded, "rows", lambda self: rows.append(len(self.left_B)) or decode(self)
    )
    return rows


@pytest.mark.heavy
def test_a_gpu_takes_steps_unattended_while_all_rows_are_greedy_and_go_on(monkeypatch):
    asked = [Request(PROMPTS[1], 40, GREEDY, frozenset({1})), Request(PROMPTS[2], 20, GREEDY)]
    wanted = [output.tokens for output in Engine(tiny_model(DENSE)).complete(asked)]
    monkeypatch.setattr(Programs, "on_gpu", True)
    own = Engine(tiny_model(DENSE), streaming=False)
    unattended, compiled = [], own._programs.compiled

    def counted(function, *arguments, **static):
        if function is decoding.decode:
            unattended.append(arguments[-2] is None)
        return compiled(function, *arguments, **static)

    monkeypatch.setattr(own._programs, "compiled", counted)
    found = [output.tokens for output in own.complete(asked)]
    assert found == wanted and unattended == [True, True, False]
    unattended.clear()
    own.complete([*asked, Request(PROMPTS[1], 30)])
    assert not any(unattended)  # one of them draws


def test_a_batch_that_nobody_joins_goes_on_in_fewer_rows(monkeypatch):
    wanted = Engine(tiny_model(DENSE)).complete(UNEVEN)
    rows = decoded_rows(monkeypatch)
    found = Engine(tiny_model(DENSE), streaming=False).complete(UNEVEN)
    for output, own in zip(found, wanted, strict=True):
        assert (output.tokens, output.finish) == (own.tokens, own.finish)
        np.testing.assert_allclose(output.report.logprobs, own.report.logprobs, atol=1e-5)
    # The fewest are 32, which take 34 steps more in three calls.
    assert rows == [64, 48, 32, 32, 32]


@pytest.mark.heavy
def test_a_batch_on_a_mesh_goes_on_in_fewer_rows(monkeypatch):
    model = tiny_model(DENSE)
    wanted = Engine(model).complete(UNEVEN)
    rows = decoded_rows(monkeypatch)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, n_devices=8)
    spread = jax.device_put(model, shardings(model, mesh))
    found = Engine(spread, streaming=False).complete(UNEVEN)
    assert [output.tokens for output in found] == [output.tokens for output in wanted]
    assert rows == [64, 48, 32, 32, 32]


class Forced:
    """Steering that lets only the given tokens be drawn, one after the other."""

    def __init__(self, tokens, vocab_size=TINY.vocab_size):
        self.left, self.vocab_size, self.seen = list(tokens), vocab_size, []

    def bias(self):
        bias = np.full(self.vocab_size, -np.inf, np.float32)
        bias[self.left[len(self.seen)]] = 0
        return bias

    def push(self, token):
        self.seen.append(token)


@pytest.mark.parametrize("speculative", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_steering_rules_its_own_row_alone(speculative):
    """It is asked before each token and told of each, in the prompt's chunk and after it."""
    steering = Forced([4, 90, 4, 31, 1, 5])
    given = requests()
    for sampling in (GREEDY, Sampling(seed=4)):
        steering.seen.clear()
        given[1] = Request(PROMPTS[1], 6, sampling, frozenset({1}), steering=steering)
        outputs = engine(speculative).complete(given)
        assert outputs[1].tokens == steering.seen == [4, 90, 4, 31, 1]
        assert outputs[1].finish == "stop"
        for row in (0, 2, 3):
            assert outputs[row].tokens == recomputed()[row][: MOST[row]]


def test_steering_without_a_bias_changes_nothing():
    steering = Forced([])
    steering.bias = lambda: None
    given = Request(PROMPTS[1], 6, GREEDY, steering=steering)
    (output,) = engine().complete([given])
    assert output.tokens == steering.seen == recomputed()[1][:6] and output.finish == "length"


def test_most_likely_tokens_are_reported_with_their_log_probabilities():
    given = [Request(PROMPTS[1], 5, GREEDY, logprobs=True, top_logprobs=3), Request((7,), 2)]
    first, second = engine().complete(given)
    text = np.asarray([[*PROMPTS[1], *first.tokens]], np.int32)
    logits = np.asarray(tiny_model()(text)[0, len(PROMPTS[1]) - 1 : -1], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    order = np.argsort(-logprobs, axis=-1)[:, :3]
    np.testing.assert_array_equal(first.report.top_ids, order)
    wanted = np.take_along_axis(logprobs, order, axis=-1)
    np.testing.assert_allclose(first.report.top_logprobs, wanted, atol=1e-5)
    np.testing.assert_allclose(first.report.logprobs, wanted[:, 0], atol=1e-5)
    assert second.report.top_ids is None and second.report.logprobs is None


def test_examples_need_a_largest_batch():
    with pytest.raises(ValueError, match="examples need max_batch"):
        Engine(tiny_model(), examples=[Request((0,), 1)])


@pytest.mark.parametrize("prefix_tokens", [0, 64])
def test_embeddings_replace_tokens_whatever_the_chunks(prefix_tokens):
    """Two pictures on the same ids, and the ids alone, against the whole forward pass."""
    config = dataclasses.replace(TINY, n_mtp=0)
    model = tiny_model(config)
    prompt, places = PROMPTS[0], np.array([3, 14, 15, 16, 31, 32, 39])
    rng = np.random.default_rng(0)
    pictures = [Given(places, rng.normal(size=(7, 32)).astype(np.float32)) for _ in range(2)]
    forward = jax.jit(lambda rows, given: model.hidden(rows, embeddings=given).main_BTD)
    wanted = []
    for given in [*pictures, None]:
        tokens, row = list(prompt), []
        for _ in range(5):
            padded, mask = np.zeros((1, 64), np.int32), np.zeros((1, 64), bool)
            padded[0, : len(tokens)] = tokens
            values = np.zeros((1, 64, 32), np.float32)
            if given:
                mask[0, places], values[0, places] = True, given.values
            hidden = forward(padded, Embeddings(jnp.array(mask), jnp.array(values)))
            row.append(int(model.logits(hidden)[0, len(tokens) - 1].argmax()))
            tokens.append(row[-1])
        wanted.append(row)
    own = Engine(model, prefill_chunk=16, prefix_tokens=prefix_tokens)
    asked = [Request(prompt, 5, GREEDY, given=given) for given in [*pictures, None]]
    assert [output.tokens for output in own.complete(asked)] == wanted
    # What is kept of one picture is not another's.
    again = [own.complete([each])[0] for each in reversed(asked)]
    assert [output.tokens for output in reversed(again)] == wanted
    assert len({tuple(row) for row in wanted}) == 3

"""Prompts on devices of their own: the same tokens, known prefixes, and nobody waits."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dsjax.generate.balancing import Balancer
from dsjax.generate.engine import Engine, Request
from dsjax.generate.page_files import PageFiles
from dsjax.generate.prompts import Started
from dsjax.generate.sampling import Sampling
from dsjax.model.parameters import shardings
from dsjax.parallel.mesh import two_meshes
from tests.generate.test_balancing import skewed
from tests.generate.test_engine import GREEDY, drive
from tests.generate.test_warming import Traced, described
from tests.model.tiny import TINY, tiny_model

DENSE = dataclasses.replace(TINY, n_layers=1, n_dense_layers=1, n_mtp=0)
GROUPED = {"attention": "gqa", "n_kv_heads": 2, "head_dim": 8, "qk_norm": True, "n_mtp": 0}
LONG = tuple(range(3, 43))
# Three chunks, one that begins in the same way, a short one, and one in more than 16 pages.
CROWD = [
    Request(LONG, 12, GREEDY, logprobs=True),
    Request((*LONG[:37], 90, 91, 92), 20, Sampling(seed=3), logprobs=True),
    Request((7, 9), 9, GREEDY, logprobs=True),
    Request(LONG * 7, 8, GREEDY, logprobs=True),
    Request(LONG, 12, GREEDY, logprobs=True),
]


def apart(model, sizes, others, **options):
    meshes = two_meshes(sizes, others)
    own, prompts = (
        jax.device_put(model, shardings(model, mesh) if mesh else jax.devices()[0])
        for mesh in meshes
    )
    return Engine(own, prompt_model=prompts, prefill_chunk=16, **options)


@functools.cache
def dense():
    """On two devices, without meshes; keeps prefixes."""
    here, there = (jax.device_put(tiny_model(DENSE), device) for device in jax.devices()[:2])
    return Engine(here, prompt_model=there, prefill_chunk=16, prefix_tokens=640)


@functools.cache
def alone(config, speculative=False):
    model = skewed() if config is None else tiny_model(config)
    own = Engine(model, speculative=speculative, prefill_chunk=16)
    return [own.complete([request])[0] for request in CROWD]


def assert_same(found, wanted):
    assert (found.tokens, found.finish) == (wanted.tokens, wanted.finish)
    np.testing.assert_allclose(found.report.logprobs, wanted.report.logprobs, atol=1e-5)


def assert_crowd(own, config, speculative=False):
    for arrivals in ([0, 1, 3, 9, 30], [0] * 5):
        found = drive(own, list(zip(CROWD, arrivals, strict=True)))
        assert len(found) == len(CROWD)
        for request, output in found.values():
            assert_same(output, alone(config, speculative)[CROWD.index(request)])


SLOW = pytest.mark.slow


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("changes", "sizes", "others", "speculative"),
    [
        ({}, {"data": 2, "expert": 2}, {"context": 2, "tensor": 2}, True),
        pytest.param({}, {"context": 4}, {"context": 2, "expert": 2}, True, marks=SLOW),
        pytest.param({}, {}, {"expert": 4}, False, marks=SLOW),
        pytest.param({"n_mtp": 0}, {"data": 1}, {"data": 1}, False, marks=SLOW),
        (GROUPED, {"context": 2, "tensor": 2}, {"data": 3}, False),
        pytest.param({}, {"tensor": 2}, {"tensor": -1, "data": 3}, False, marks=SLOW),
    ],
    ids=str,
)
def test_tokens_are_those_of_one_mesh(changes, sizes, others, speculative):
    """Layouts that differ in all that a cache can be split by; batches divide by both."""
    config = dataclasses.replace(TINY, **changes)
    options = {"speculative": speculative, "prefix_tokens": 2048, "max_batch": 6}
    own = apart(tiny_model(config), sizes, others, **options)
    assert_crowd(own, config, speculative)
    assert own.statistics.cached_tokens > 0


@pytest.mark.heavy
def test_the_next_turn_knows_the_reply():
    """Which was decoded on other devices than those that know it."""
    own = dense()
    own.load(tiny_model(DENSE))
    (reply,) = own.complete([Request(LONG, 30, Sampling(seed=8))])
    again = Request((*LONG, *reply.tokens, 5, 6), 9, GREEDY, logprobs=True)
    (output,) = own.complete([again])
    assert output.cached_tokens == 64  # of 69
    (wanted,) = Engine(tiny_model(DENSE), prefill_chunk=16).complete([again])
    assert_same(output, wanted)


def test_nobody_waits_for_a_chunk(monkeypatch):
    """Of what is decided on the host, without a model."""
    monkeypatch.setattr("dsjax.generate.engine.Programs", Traced)
    monkeypatch.setattr("dsjax.generate.prefill.Programs", Traced)
    model, prompt_model = described(DENSE, 1), described(DENSE, 1)
    own = Engine(model, prompt_model=prompt_model, prefill_chunk=16, max_batch=4)
    monkeypatch.setattr(Started, "ended", property(lambda self: False))
    first = own.add(Request((1,) * 20, 200))
    while not own.step():  # nothing else runs, so it is waited for
        pass
    second = own.add(Request((1,) * 20, 9))
    assert all(list(own.step()) == [first] for _ in range(6))
    monkeypatch.setattr(Started, "ended", property(lambda self: True))
    came = [list(own.step()) for _ in range(5)]
    # Of two chunks the first gives no token; decoding goes on after each.
    assert [first] in came[:2] and [second] in came[:4]
    own.cancel(first)
    own.cancel(second)
    assert not own.busy


@pytest.mark.heavy
def test_decoding_goes_on_while_a_prompt_runs(monkeypatch):
    own = dense()
    own.load(tiny_model(DENSE))
    first = own.add(dataclasses.replace(CROWD[0], max_new_tokens=200))
    found = {first: []}

    def step():
        new = own.step()
        for id, output in new.items():
            found.setdefault(id, []).extend(output.tokens)
        return new

    while not step():
        pass
    with monkeypatch.context() as slow:
        slow.setattr(Started, "ended", property(lambda self: False))
        known = own.statistics.cached_tokens
        second = own.add(CROWD[0])
        for _ in range(4):
            assert list(step()) == [first]
    while own.busy:
        step()
    assert own.statistics.cached_tokens - known == 32  # by the second, of the first's prompt
    (wanted,) = Engine(tiny_model(DENSE), prefill_chunk=16).complete([CROWD[0]])
    assert found[second] == wanted.tokens == found[first][: len(wanted.tokens)]


@pytest.mark.heavy
def test_a_prompt_that_leaves_changes_nobody_and_is_known():
    own = dense()
    own.load(tiny_model(DENSE))
    other = CROWD[3]
    gone, stays = own.add(CROWD[0]), own.add(other)
    own.step()  # of both one chunk
    own.cancel(gone)
    found = []
    while own.busy:
        new = own.step()
        assert gone not in new
        found += new[stays].tokens if stays in new else []
    assert found == alone(DENSE)[3].tokens
    lone = own.add(Request((50, *LONG), 5, GREEDY))
    own.step()
    own.cancel(lone)  # nobody is left while a chunk may still run
    assert not own.busy
    (again,) = own.complete([CROWD[0]])
    assert_same(again, alone(DENSE)[0])
    assert again.cached_tokens >= 16


@pytest.mark.heavy
def test_new_weights_reach_both_places():
    own = dense()
    own.load(tiny_model(DENSE, seed=1))
    (before,) = own.complete([CROWD[0]])
    own.load(tiny_model(DENSE))
    (after,) = own.complete([CROWD[0]])
    assert_same(after, alone(DENSE)[0])
    assert after.tokens != before.tokens and after.cached_tokens == 0


@pytest.mark.heavy
def test_prefixes_of_either_place_come_back_from_disk(tmp_path):
    request = Request((*LONG, 3, 4), 9, GREEDY, logprobs=True)
    found = []
    for _ in range(2):
        files = PageFiles(tmp_path, n_bytes=10**8, fingerprint="w")
        here, there = (jax.device_put(tiny_model(DENSE), device) for device in jax.devices()[:2])
        own = Engine(here, prompt_model=there, prefill_chunk=16, prefix_tokens=64, page_files=files)
        found += own.complete([request])
        files.close()
    assert_same(found[1], found[0])
    assert [output.cached_tokens for output in found] == [0, 32]


@pytest.mark.slow
def test_experts_move_where_decoding_runs():
    model = skewed()
    mesh, prompt_mesh = two_meshes({"expert": 4}, {"tensor": 2})
    own, prompts = (jax.device_put(model, shardings(model, each)) for each in (mesh, prompt_mesh))
    balancer = Balancer(own, mesh, n_redundant=4, every=3)
    engine = Engine(own, prefill_chunk=16, balancer=balancer, prompt_model=prompts)
    assert_crowd(engine, None)
    assert balancer.balance.placements and balancer.balance.after < balancer.balance.plain == 2.0


def test_what_cannot_run_prompts_is_told():
    model = tiny_model(DENSE)
    with pytest.raises(ValueError, match=r"devices \[0\] would run prompts and decode too; give"):
        Engine(model, prompt_model=model)
    there = jax.device_put(tiny_model(dataclasses.replace(DENSE, dim=48)), jax.devices()[1])
    with pytest.raises(ValueError, match="another config or precision than the one that decodes"):
        Engine(model, prompt_model=there)

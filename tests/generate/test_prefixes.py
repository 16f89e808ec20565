"""Known prefixes: which pages hold which texts, and that generation from them is the same."""

import functools
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from dsjax.generate.engine import Engine, Request
from dsjax.generate.page_files import PageFiles
from dsjax.generate.prefixes import Tree
from dsjax.generate.programs import Programs
from dsjax.generate.sampling import Sampling
from dsjax.model.parameters import shardings
from dsjax.parallel.mesh import make_mesh
from tests.generate.test_engine import GREEDY, drive, engine
from tests.model.tiny import tiny_model

LONG = tuple(range(3, 43))


def test_a_text_is_found_by_its_tokens_in_whole_pages():
    tree = Tree(8, 4)
    assert tree.find(LONG) == []
    assert tree.add(LONG[:10]) == {0: 0, 1: 1}  # the last page would not be full
    assert tree.add(LONG[:13]) == {2: 2} and tree.add(LONG[:13]) == {}
    assert tree.find(LONG) == [0, 1, 2] and tree.find(LONG[:11]) == [0, 1]
    assert tree.find(LONG[4:]) == []  # the same tokens at another place
    other = LONG[:4] + LONG[8:16]
    assert tree.find(other) == [0] and tree.add(other) == {1: 3, 2: 4}
    assert tree.find(LONG) == [0, 1, 2] and tree.find(other) == [0, 3, 4] and len(tree) == 5


def test_texts_of_equal_hash_are_different_texts():
    first, second = (-1,) * 4, (-2,) * 4
    assert hash(first) == hash(second)
    tree = Tree(2, 4)
    tree.add(first)
    assert tree.find(second) == []
    tree.add(second)
    assert (tree.find(first), tree.find(second)) == ([0], [1])


def test_owners_do_not_share():
    tree = Tree(4, 4)
    tree.add(LONG[:8], "ada")
    assert tree.find(LONG, "bob") == tree.find(LONG) == []
    assert tree.find(LONG, "ada") == [0, 1]


def test_the_least_recently_used_page_makes_room_and_never_one_that_is_continued():
    tree = Tree(3, 4)
    tree.add(LONG[:8])
    tree.add(LONG[20:24])
    tree.find(LONG[:4])
    assert tree.add(LONG[30:34]) == {0: 1}  # the end of the first text is oldest
    assert tree.find(LONG[:8]) == [0] and tree.find(LONG[20:24]) == [2]
    assert tree.add(LONG) == {1: 1, 2: 2}  # all there are, and the rest is left out
    assert tree.find(LONG) == [0, 1, 2]
    tree.clear()
    assert tree.find(LONG) == [] and tree.add(LONG[:4]) == {0: 0}


def test_the_end_of_a_text_goes_before_its_beginning():
    tree = Tree(2, 4)
    tree.add(LONG[:8])
    assert tree.add(LONG[20:24]) == {0: 1} and tree.find(LONG) == [0]


def test_a_text_never_takes_its_own_pages():
    tree = Tree(3, 4)
    tree.add(LONG[:8])
    tree.add(LONG[20:24])
    assert tree.add(LONG[:16]) == {2: 2}
    assert tree.find(LONG) == [0, 1, 2]


@functools.cache
def keeping(speculative, prefix_tokens=160):
    return Engine(
        tiny_model(), speculative=speculative, prefill_chunk=16, prefix_tokens=prefix_tokens
    )


def ask(own, request):
    (output,) = own.complete([request])
    return output


# The same beginning: the whole of it, one that ends within a page, and one that goes on.
TURNS = [
    Request(LONG, 12, GREEDY, logprobs=True),
    Request(LONG, 12, Sampling(seed=3), logprobs=True),
    Request((*LONG[:37], 90, 91, 92), 9, GREEDY, logprobs=True),
    Request(LONG[:33], 5, GREEDY, logprobs=True),
    Request(LONG[:32], 5, GREEDY, logprobs=True),
]


@functools.cache
def turns_alone(speculative):
    return [ask(engine(speculative), request) for request in TURNS]


def assert_same(found, wanted):
    assert (found.tokens, found.finish) == (wanted.tokens, wanted.finish)
    np.testing.assert_allclose(found.report.logprobs, wanted.report.logprobs, atol=1e-5)


@pytest.mark.parametrize("speculative", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_known_prefixes_change_no_token(speculative):
    own = keeping(speculative)
    own.load(tiny_model())
    found = [ask(own, request) for request in TURNS]
    for output, wanted in zip(found, turns_alone(speculative), strict=True):
        assert_same(output, wanted)
    # With drafts the last 16 tokens of a prefix run again, and the last token of a prompt always.
    again = 16 if speculative else 0
    assert [output.cached_tokens for output in found] == [
        0, 32 - again, 32 - again, 32 - again, 16 - again
    ]  # fmt: skip
    assert own.statistics.cached_tokens == found[-1].cached_tokens
    assert own.statistics.prompt_tokens == 32 - found[-1].cached_tokens


@pytest.mark.parametrize("speculative", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_the_next_turn_knows_the_reply(speculative):
    own = keeping(speculative)
    first = Request(LONG, 30, Sampling(seed=8))
    reply = ask(own, first).tokens
    second = Request((*LONG, *reply, 5, 6, 7), 9, GREEDY, logprobs=True)
    output = ask(own, second)
    assert_same(output, ask(engine(speculative), second))
    assert output.cached_tokens == 64 - (16 if speculative else 0)  # of 69 that were in the cache


def test_new_weights_know_nothing():
    own = keeping(True)
    ask(own, TURNS[0])
    assert ask(own, TURNS[0]).cached_tokens
    own.load(tiny_model())
    assert ask(own, TURNS[0]).cached_tokens == 0


@pytest.mark.parametrize("failing", ["decode", "prefill", "save"])
def test_a_step_that_fails_leaves_nothing_behind(failing, monkeypatch):
    """Neither caches that are half written nor pages that a text was to have."""
    own = keeping(True)
    own.load(tiny_model())
    ask(own, TURNS[0])
    compiled = Programs.compiled

    def fails(programs, function, *arguments, **static):
        run = compiled(programs, function, *arguments, **static)
        if function.__name__ != failing:
            return run

        def broken():
            run()  # so that what it was given is gone
            raise RuntimeError("no memory")

        return broken

    with monkeypatch.context() as patch:
        patch.setattr(Programs, "compiled", fails)
        own.add(Request(LONG[::-1], 12, GREEDY))
        with pytest.raises(RuntimeError, match="no memory"):
            while own.busy:
                own.step()
        own.abandon()
    assert not own.busy
    for request in (TURNS[0], Request(LONG[::-1], 12, GREEDY, logprobs=True)):
        found = ask(own, request)
        assert found.cached_tokens == 0
        assert_same(found, ask(engine(True), request))


def test_few_pages_change_no_token():
    """Fewer than one prompt takes, so that texts push each other out."""
    own = keeping(True, 48)
    texts = [TURNS[0], Request(LONG[::-1], 12, GREEDY, logprobs=True), TURNS[2], TURNS[0]]
    for request in texts:
        assert_same(ask(own, request), ask(engine(True), request))


@pytest.mark.heavy
def test_a_cancelled_request_is_known():
    own = keeping(False)
    own.load(tiny_model())
    running, prompt = own.add(Request((1, 2) * 20, 50, GREEDY)), own.add(Request(LONG, 9, GREEDY))
    own.step()
    own.cancel(prompt)  # of which one chunk has run
    while not own.step().get(running):
        pass
    own.step()
    own.cancel(running)
    assert ask(own, TURNS[0]).cached_tokens == 16
    assert ask(own, Request((1, 2) * 20, 1, GREEDY)).cached_tokens == 32


@pytest.mark.heavy
def test_experts_of_a_known_prompt_are_reported():
    own = keeping(False)
    ask(own, TURNS[0])
    asked = Request(LONG, 4, GREEDY, experts=True)
    output, wanted = ask(own, asked), ask(engine(), asked)
    assert output.cached_tokens == 0 and output.tokens == wanted.tokens
    np.testing.assert_array_equal(output.report.experts, wanted.report.experts)


@pytest.mark.heavy
@pytest.mark.parametrize("speculative", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_known_prefixes_change_no_token_in_company(speculative):
    """Prompts known to different lengths run together, one of them near the end of its cache."""
    own = keeping(speculative, 2048)
    texts = [LONG * 6, LONG, (*LONG[:20], *LONG), (7,), LONG * 3, LONG * 6]
    crowd = [Request(text, 8, GREEDY, logprobs=True) for text in texts]
    wanted = [ask(engine(speculative), request) for request in crowd]
    for arrivals in ([0, 1, 9, 9, 30, 40], [0] * 6, [0, 0, 0, 1, 2, 2]):
        found = drive(own, list(zip(crowd, arrivals, strict=True)))
        for _, (request, output) in found.items():
            assert_same(output, wanted[crowd.index(request)])


@pytest.mark.heavy
@pytest.mark.parametrize("speculative", [pytest.param(False, marks=pytest.mark.slow), True])
def test_known_prefixes_change_no_token_on_a_mesh(speculative):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, n_devices=8)
    spread = jax.device_put(tiny_model(), shardings(tiny_model(), mesh))
    own = Engine(spread, speculative=speculative, prefill_chunk=16, prefix_tokens=256)
    found = [ask(own, request) for request in TURNS]
    for output, wanted in zip(found, turns_alone(speculative), strict=True):
        assert_same(output, wanted)
    assert found[1].cached_tokens == (16 if speculative else 32)


def test_pages_must_be_enough_for_one():
    with pytest.raises(ValueError, match=r"prefix_tokens=8 must be at least 16, a page of 16 tok"):
        Engine(tiny_model(), prefill_chunk=16, prefix_tokens=8)


def with_files(folder, fingerprint="w", **options):
    files = PageFiles(folder, n_bytes=10**8, fingerprint=fingerprint)
    options = {"prefill_chunk": 16, "prefix_tokens": 32} | options
    return Engine(tiny_model(), page_files=files, **options), files


@pytest.mark.heavy
@pytest.mark.parametrize("speculative", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_memory_has_lost_comes_back_from_disk(tmp_path, speculative):
    """Also after a restart, and never for other weights; no token changes."""
    again = 16 if speculative else 0
    other = Request(tuple(range(50, 90)), 4, GREEDY)
    own, files = with_files(tmp_path, speculative=speculative)
    assert ask(own, TURNS[0]).cached_tokens == 0
    ask(own, other)  # memory holds two pages alone
    files.close()
    assert own.statistics.cached_tokens == 0
    own, files = with_files(tmp_path, speculative=speculative)
    for request, wanted in zip(TURNS, turns_alone(speculative), strict=True):
        ask(own, other)
        found = ask(own, request)
        assert_same(found, wanted)
        assert found.cached_tokens == (len(request.prompt) - 1) // 16 * 16 - again
    # All newcomers of a batch, and equal prompts, find theirs.
    outputs = own.complete([*TURNS, TURNS[0], other])
    for output, wanted in zip(outputs, turns_alone(speculative), strict=False):
        assert_same(output, wanted)
    files.close()
    own, files = with_files(tmp_path, "v", speculative=speculative)
    assert ask(own, TURNS[0]).cached_tokens == 0
    files.close()


def test_damaged_page_is_run_again(tmp_path):
    own, files = with_files(tmp_path)
    wanted = ask(own, TURNS[0])
    files.close()
    for path in (tmp_path / "pages").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    own, files = with_files(tmp_path)
    found = ask(own, TURNS[0])
    assert_same(found, wanted)
    assert found.cached_tokens == 0
    files.close()


def test_other_requests_go_on_while_the_disk_is_read(tmp_path, monkeypatch):
    own, files = with_files(tmp_path)
    ask(own, TURNS[0])
    files.close()
    own, files = with_files(tmp_path)
    gate, read = threading.Event(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: gate.wait(60) and read(path))
    slow, other = own.add(TURNS[0]), own.add(Request((7, 8, 9), 3, GREEDY))
    done = {}
    while other not in done:
        done |= {id: out for id, out in own.step().items() if out.finish}
    assert slow not in done and own.step() == {}
    gate.set()
    found = {id: out for _ in range(60) for id, out in own.step().items()}
    assert slow in found and own.statistics.cached_tokens == 32
    files.close()


def test_new_weights_do_not_read_the_files_of_the_old(tmp_path):
    own, files = with_files(tmp_path)
    ask(own, TURNS[0])
    own.load(tiny_model())
    assert ask(own, TURNS[0]).cached_tokens == 0
    files.close()


def test_files_need_pages_in_memory(tmp_path):
    with pytest.raises(ValueError, match="page_files need prefix_tokens"):
        with_files(tmp_path, prefix_tokens=0)


@pytest.mark.heavy
def test_page_files_of_one_mesh_serve_another(tmp_path):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, n_devices=8)
    placed = jax.device_put(tiny_model(), shardings(tiny_model(), mesh))
    files = PageFiles(tmp_path, n_bytes=10**8, fingerprint="w")
    own = Engine(placed, prefill_chunk=16, prefix_tokens=64, page_files=files)
    assert_same(ask(own, TURNS[0]), turns_alone(False)[0])
    files.close()
    own, files = with_files(tmp_path)
    found = ask(own, TURNS[0])
    assert_same(found, turns_alone(False)[0])
    files.close()
    files = PageFiles(tmp_path, n_bytes=10**8, fingerprint="w")
    own = Engine(placed, prefill_chunk=16, prefix_tokens=64, page_files=files)
    again = ask(own, TURNS[0])
    assert_same(again, turns_alone(False)[0])
    assert found.cached_tokens == again.cached_tokens == 32
    files.close()

"""After a warm-up nothing is compiled, whatever requests come, and tokens are the usual ones."""

import dataclasses
import functools
import random
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dsjax.generate.decoding import MAX_STEPS, Carry, Decoded, Drawn
from dsjax.generate.engine import Engine, Request
from dsjax.generate.pages import Sent
from dsjax.generate.record import Record
from dsjax.generate.request import join
from dsjax.generate.sampling import Sampling
from dsjax.model.cache import Cache
from tests.generate.test_engine import Forced
from tests.model.tiny import TINY, tiny_model

CONFIG = dataclasses.replace(TINY, max_seq_len=48, n_layers=2)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def compilations():
    names = []

    def count(name, seconds, **details):
        names.append(name) if name.endswith("backend_compile_duration") else None

    jax.monitoring.register_event_duration_secs_listener(count)
    yield names
    jax.monitoring.unregister_event_duration_listener(count)


def steered():
    return Request((5, 6), 3, Sampling(seed=3), steering=Forced([7, 8, 9]), logprobs=True)


def test_no_request_compiles_anything_after_a_warm_up(compilations):
    # A steered request asks for reports, so that there are two kinds of programs, not three.
    examples = [Request((0,), 1), dataclasses.replace(steered(), steering=Forced([0] * 4))]
    engine = Engine(
        tiny_model(CONFIG), prefill_chunk=16, max_batch=4, examples=examples, prefix_tokens=64
    )
    assert engine.shapes == ((1, 4), (1, 4), (48,), (16,))
    shown = list(engine.warm())
    assert shown == [(done, 15) for done in range(16)]
    alone = [Request(tuple(range(3, 20)), 9, GREEDY), Request((50, 20), 6, GREEDY)]
    wanted = [engine.complete([request])[0].tokens for request in alone]
    assert compilations
    compilations.clear()
    found = {engine.add(alone[0]): []}
    for request in (steered(), alone[1], Request((9,) * 20, 4), steered(), alone[0]):
        for id, output in engine.step().items():
            found[id].append(output)
        found[engine.add(request)] = []
    while engine.busy:
        for id, output in engine.step().items():
            found[id].append(output)
    tokens = [join(outputs).tokens for outputs in found.values()]
    assert compilations == []
    assert [tokens[0], tokens[2], tokens[5]] == [*wanted, wanted[0]]
    assert engine.statistics.cached_tokens > 0
    assert tokens[1] == tokens[4] == [7, 8, 9] and len(tokens[3]) == 4
    assert np.isfinite(join(list(found.values())[1]).report.logprobs).all()


class Free:
    """Steering that lets everything be drawn."""

    def bias(self):
        return None

    def push(self, token):
        pass


class Sometimes(np.ndarray):
    """An array that is often not there yet."""

    def is_ready(self):
        return random.random() < 0.3


class Traced:
    """Programs that compute nothing, and what is asked of them, on a GPU, which has the most."""

    on_gpu = True

    def __init__(self, model):
        self.model, self.batch_parts, self.asked = model, model.parts, set()
        self.mesh = None

    def compiled(self, function, *arguments, **static):
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
        self.asked.add((function.__name__, *sorted(static.items()), *shapes))
        return functools.partial(getattr(self, function.__name__), *arguments, **static)

    def empty_carry(self, *, batch, length, n_drafts):
        cache = Cache({"entry": np.zeros((1, batch, 1, length, 1), np.int8)}, None, None)
        return Carry(cache, np.zeros((batch, n_drafts + 1, 1)))

    def empty_pool(self, *, n_pages, page, n_drafts):
        return Cache({"entry": np.zeros((1, n_pages, 1, page, 1), np.int8)}, None, None)

    def insert(self, into, *rest):
        return into

    fill = save = receive = store = insert

    def send(self, carry, row, places_X, *, n_pages):
        length = carry.cache.dense["entry"].shape[3]
        assert length % n_pages == 0 and (places_X[places_X < 1 << 30] < n_pages).all()
        entry = np.zeros((1, len(places_X), 1, length // n_pages, 1), np.int8)
        return carry, Sent(Cache({"entry": entry}, None, None), carry.hidden_BWD[:1])

    def received(self, sent):
        return sent

    def prefill(self, carry, tokens_BX, starts_B, lengths_B, rows_X, knobs, *, wanted):
        size = tokens_BX.shape[1] - carry.hidden_BWD.shape[1] + 1
        length = carry.cache.dense["entry"].shape[3]
        assert (starts_B + size <= length).all() and (starts_B % 16 == 0).all()
        drawn_X = np.ones(len(rows_X), np.int32).view(Sometimes)
        return carry, Drawn(drawn_X, self.record(wanted, (len(rows_X), 1)))

    def decode(self, carry, position_B, recent_BW, left_B, stops, knobs, steps, enough, *, wanted):
        if steps is None:
            assert not np.any(knobs.temperature_B)
            steps = MAX_STEPS
        shape = (MAX_STEPS, *recent_BW.shape)
        tokens_NBW = np.full(shape, -1, np.int32)
        tokens_NBW[:steps, :, 0] = np.arange(steps)[:, None] < left_B
        tokens_NBW[tokens_NBW == 0] = -1
        ran_NB = tokens_NBW[:, :, 0] > 0
        new_B = ran_NB.sum(axis=0).astype(np.int32)
        return carry, Decoded(
            position_B + new_B, recent_BW, left_B - new_B, steps, tokens_NBW, ran_NB,
            np.zeros_like(ran_NB, np.int32), self.record(wanted, shape),
        )  # fmt: skip

    def record(self, wanted, shape):
        ones = np.ones(shape, np.float32)
        top = np.ones((*shape, wanted.top), np.int32) if wanted.top else None
        own = ones if wanted.logprobs else None
        return Record(own, own, top_ids=top, top_logprobs=top)


def described(config, parts):
    """What `Traced` needs of a model on devices of its own."""
    devices = SimpleNamespace(device_set={object()})
    return SimpleNamespace(config=config, policy=None, parts=parts, sharding=devices)


@pytest.mark.parametrize(
    ("length", "max_batch", "chunk", "parts", "n_mtp", "apart"),
    [(4096, 16, 256, 1, 0, 0), (4096, 16, 256, 1, 1, 0), (20_000, 70, 64, 1, 0, 0),
     (600, 6, 16, 2, 1, 0), (3000, 16, 256, 8, 0, 0), (48, 1, 16, 1, 0, 0),
     (4096, 16, 256, 1, 1, 1), (600, 6, 16, 2, 0, 3), (48, 1, 16, 1, 0, 1)],
)  # fmt: skip
def test_whatever_comes_asks_for_no_other_program(
    monkeypatch, length, max_batch, chunk, parts, n_mtp, apart
):
    """Also where prompts run on devices of their own, in so many parts."""
    monkeypatch.setattr("dsjax.generate.engine.Programs", Traced)
    monkeypatch.setattr("dsjax.generate.prefill.Programs", Traced)
    config = dataclasses.replace(TINY, max_seq_len=length, n_mtp=n_mtp)
    model, prompt_model = (described(config, parts) for parts in (parts, apart or 1))
    plain = Request((0,), 1, stop_ids=frozenset({0}))
    kinds = [plain, dataclasses.replace(plain, logprobs=True, top_logprobs=4,
                                        steering=Free())]  # fmt: skip
    engine = Engine(
        model, speculative=bool(n_mtp), prefill_chunk=chunk, max_batch=max_batch, examples=kinds,
        prefix_tokens=2048, prompt_model=prompt_model if apart else None,
    )  # fmt: skip
    *_, (done, total) = engine.warm()
    places = engine._programs, engine._prompting.programs
    known = [set(place.asked) for place in places]
    assert done == total
    if not apart:
        assert len(known[0]) == total + 1  # and the pool of pages
    rng = random.Random(length + max_batch)
    ids = []
    for _ in range(600):
        for _ in range(rng.choice([0] * 9 + [1, 1, 2, 5, max_batch])):
            n_prompt = int(rng.paretovariate(0.5))
            if rng.random() < 0.2:  # at the end of a cache, and perhaps known
                n_prompt = rng.choice(engine.shapes.lengths) - rng.randrange(1, 70)
            n_prompt = min(max(n_prompt, 1), length - 1)
            most = min(int(rng.paretovariate(0.5)), length - n_prompt)
            request = dataclasses.replace(rng.choice(kinds), prompt=(rng.randrange(2),) * n_prompt,
                                          max_new_tokens=most, owner=rng.choice("ab"),
                                          sampling=Sampling(most % 2))  # fmt: skip
            ids.append(engine.add(request))
        if ids and rng.random() < 0.1:
            engine.cancel(rng.choice(ids))
        if rng.random() < 0.03:  # all but one leave
            for id in ids[:-1]:
                engine.cancel(id)
            ids = ids[-1:]
        engine.step()
    for place, programs in zip(places, known, strict=True):
        assert place.asked <= programs

"""After a warm-up nothing is compiled, whatever requests come, and tokens are the usual ones."""

import dataclasses

import jax
import numpy as np
import pytest

from dsjax.generate.engine import Engine, Request
from dsjax.generate.request import join
from dsjax.generate.sampling import Sampling
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

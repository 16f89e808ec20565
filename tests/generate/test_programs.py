"""How often an engine compiles, and which weights its programs take."""

import gc
import weakref

import jax
import jax.numpy as jnp
import pytest

from dsjax.generate.engine import Engine
from dsjax.generate.sampling import Sampling
from tests.generate.test_engine import CROWD, requests, run, wanted
from tests.model.tiny import tiny_model


def count_compilations(monkeypatch):
    compiled = []
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self: compiled.append(self) or compile_(self)
    )
    return compiled


def test_each_program_is_compiled_once_for_a_bucket(monkeypatch):
    """Other prompts, limits, settings and stop ids of the same sizes need no new program."""
    compiled = count_compilations(monkeypatch)
    fresh = Engine(tiny_model(), prefill_chunk=16)
    run(fresh, requests())
    assert len(compiled) == 3  # an empty cache, chunks of 16 (the last one is filled up), decoding
    sampled = requests(Sampling(0.8, top_k=5, seed=3), [5, 3, 11, 30], stop_ids=frozenset({9}))
    run(fresh, [sampled[1], sampled[0], sampled[3], sampled[2]])
    assert len(compiled) == 3


def test_new_weights_need_no_new_program(monkeypatch):
    compiled = count_compilations(monkeypatch)
    fresh = Engine(tiny_model(seed=1), prefill_chunk=16)
    before, _ = run(fresh, requests())
    n_programs = len(compiled)
    fresh.load(tiny_model())
    after, _ = run(fresh, requests())
    assert after == wanted() != before
    assert len(compiled) == n_programs


def test_released_weights_are_held_no_more():
    model = jax.tree.map(jnp.copy, tiny_model())
    own = Engine(model, prefill_chunk=16)
    held = weakref.ref(jax.tree.leaves(model)[0])
    del model
    assert held() is not None
    own.release()
    gc.collect()
    assert held() is None
    own.load(tiny_model())


def test_weights_that_the_programs_do_not_fit_are_refused():
    own = Engine(tiny_model(), prefill_chunk=16)
    with pytest.raises(ValueError, match="another config or precision than the engine's; make a"):
        own.load(tiny_model(compute=jnp.bfloat16))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model())
    with pytest.raises(
        ValueError, match=r"\d+ of the new weights differ .*bfloat16.* for .*float32"
    ):
        own.load(narrow)
    elsewhere = jax.device_put(tiny_model(), jax.devices()[1])
    with pytest.raises(ValueError, match=r"differ from those .*; cast and place them alike"):
        own.load(elsewhere)
    own.add(CROWD[0])
    own.step()
    for change in (lambda: own.load(tiny_model()), own.release):
        with pytest.raises(ValueError, match="weights cannot change while requests run: their"):
            change()

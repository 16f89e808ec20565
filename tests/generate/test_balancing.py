"""Redundant experts under a router that prefers a few: the same tokens, more even loads."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.generate.balancing import Balancer
from dsjax.generate.engine import Engine
from dsjax.generate.request import Request
from dsjax.generate.sampling import Sampling
from dsjax.model.parameters import shardings
from dsjax.parallel.mesh import make_mesh
from tests.model.tiny import tiny_model

PROMPTS = [tuple(range(3, 43)), (50, 20, 80), tuple(range(60, 76)), (7, 9)]
REQUESTS = [Request(prompt, 24, Sampling(temperature=0.0)) for prompt in PROMPTS]


def skewed():
    """A model whose routers always choose the experts 4 and 6."""
    model = jax.tree.map(lambda leaf: leaf, tiny_model())
    bias = model.moe_layers.ffn.gate.bias
    bias.set_value(bias.get_value().at[:, jnp.array([4, 6])].add(9.0))
    return model


@functools.cache
def alone(speculative=False):
    engine = Engine(skewed(), prefill_chunk=16, speculative=speculative)
    return [output.tokens for output in engine.complete(REQUESTS)]


def spread(sizes):
    mesh = make_mesh(sizes, n_devices=math.prod(sizes.values()))
    return jax.device_put(skewed(), shardings(skewed(), mesh)), mesh


def balanced(sizes, every=3, **options):
    model, mesh = spread(sizes)
    balancer = Balancer(model, mesh, n_redundant=4, every=every)
    return Engine(model, prefill_chunk=16, balancer=balancer, **options), balancer


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("sizes", "speculative"),
    [({"expert": 4}, False), ({"expert": 2, "tensor": 2}, False), ({"data": 2, "expert": 2}, True)],
    ids=str,
)
def test_tokens_stay_the_same_while_experts_move(sizes, speculative):
    engine, balancer = balanced(sizes, speculative=speculative)
    moved_during = set()
    found = [[] for _ in REQUESTS]
    for new in engine.generate(REQUESTS):
        for tokens, more in zip(found, new, strict=True):
            tokens += more
        if not all(len(tokens) == 24 for tokens in found):
            moved_during.add(balancer.balance.placements)
    assert found == alone(speculative)
    assert len(moved_during) > 1  # in the middle of the requests
    plain, _, after, _ = balancer.balance
    # Two experts have all tokens. Each gets three slots, and six sixths of the load go over two or
    # four devices.
    assert plain == 2.0
    assert after == pytest.approx(math.ceil(6 / sizes["expert"]) / 6 * sizes["expert"])


@pytest.mark.heavy
def test_nothing_is_compiled_when_experts_move():
    engine, balancer = balanced({"expert": 4}, every=8, streaming=False)
    engine.complete(REQUESTS)
    assert balancer.balance.placements == 0
    compiled = []

    def listen(event, _, **details):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    found = [output.tokens for output in engine.complete(REQUESTS)]
    jax.monitoring.unregister_event_duration_listener(listen)
    assert balancer.balance.placements == 1
    assert found == alone() and compiled == []


def test_loads_decide_when_and_which_layers_move():
    model, mesh = spread({"expert": 2})
    balancer = Balancer(model, mesh, n_redundant=2, every=2)
    even = np.ones((2, 8), np.int64)
    uneven = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 50, 0, 50, 0]])
    before = np.asarray(model.moe_layers.ffn.experts.slots[...])
    for load in (even, even, np.zeros_like(even), np.zeros_like(even)):
        balancer.add(load)
    assert balancer.balance.placements == 0
    balancer.add(uneven)
    assert balancer.balance.placements == 1  # nobody had come at the second step
    after = np.asarray(model.moe_layers.ffn.experts.slots[...])
    np.testing.assert_array_equal(after[0], before[0])
    assert (after[1] >= 0).sum(axis=1)[[4, 6]].tolist() == [2, 2]
    # The mean of an even layer and of one whose load was on one of the two devices.
    assert balancer.balance[:3] == (1.5, 1.5, 1.0)


def test_weights_whose_experts_move_are_not_replaced():
    engine, _ = balanced({"expert": 2})
    for change in (lambda: engine.load(skewed()), engine.release):
        with pytest.raises(ValueError, match="this engine's balancer moves the experts of the wei"):
            change()


def test_a_look_at_the_loads_takes_a_step():
    model, mesh = spread({"expert": 2})
    with pytest.raises(ValueError, match="eplb_every=0 must be at least 1"):
        Balancer(model, mesh, n_redundant=2, every=0)

"""Balance losses on worked examples and in closed form; the oracle's comparison is in
test_equivalence.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import TrainConfig
from dsjax.model.balance import BalanceWeights, balance_loss, max_violation, update_bias
from dsjax.model.router import Routing
from tests.model.tiny import TINY
from tests.oracles import losses as oracle

FOUR = dataclasses.replace(TINY, n_routed_experts=4, n_expert_groups=2, n_limited_groups=2)
SCORES = [[0.9, 0.8, 0.1, 0.2], [0.7, 0.6, 0.5, 0.4], [0.2, 0.9, 0.8, 0.1], [0.6, 0.5, 0.1, 0.9]]
NAMES = ["sequence", "expert", "device", "communication"]


def _weights(name, value=1.0, devices=2, isolated=True):
    return BalanceWeights(
        **{n: value * (n == name) for n in NAMES}, n_devices=devices, isolated=isolated
    )


def _routing(scores, experts=None):
    scores = jnp.asarray(scores, jnp.float32)
    experts = jax.lax.top_k(scores, 2)[1] if experts is None else jnp.asarray(experts, jnp.int32)
    return Routing(experts, jnp.ones(experts.shape), scores, jnp.zeros(len(experts), bool))


def _loss(name, routing, documents, config=FOUR):
    loss = jax.jit(lambda *inputs: balance_loss(*inputs, _weights(name), config))
    return float(loss(routing, jnp.asarray(documents, jnp.int32)))


def test_sequence_loss_worked_example():
    assert _loss("sequence", _routing(SCORES), [[1, 1, 1, 1]]) == pytest.approx(1.128680, abs=1e-6)


def test_sequence_loss_counts_unbiased_best_whatever_was_chosen():
    elsewhere = [[2, 3]] * 4
    assert _loss("sequence", _routing(SCORES, elsewhere), [[1] * 4]) == pytest.approx(
        1.128680, abs=1e-6
    )
    assert _loss("expert", _routing(SCORES, elsewhere), [[1] * 4]) != pytest.approx(
        1.128680, abs=1e-2
    )


@pytest.mark.parametrize("name", NAMES)
def test_even_load_and_uniform_scores_give_one(name):
    experts = [[0, 1], [2, 3], [0, 1], [2, 3]] if name == "communication" else [[0, 2], [1, 3]] * 2
    config = dataclasses.replace(FOUR, n_limited_groups=1) if name == "communication" else FOUR
    routing = _routing(np.full((4, 4), 0.5), experts)
    if name == "sequence":  # ties go to the first experts, so tilt the scores evenly
        routing = _routing(np.tile([[0.6, 0.4, 0.6, 0.4], [0.4, 0.6, 0.4, 0.6]], (2, 1)))
    assert _loss(name, routing, [[1] * 4], config) == pytest.approx(1.0, abs=1e-6)


def test_documents_are_averaged_by_length_and_padding_counts_nowhere():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.05, 0.95, (24, 4))
    documents = np.array([[1] * 5 + [2] * 7, [3] * 2 + [4] * 6 + [0] * 4])
    want, flat = 0.0, documents.reshape(-1)
    for document in (1, 2, 3, 4):
        inside = scores[flat == document]
        want += len(inside) * oracle.sequence_balance(inside, 2) / 20
    assert _loss("sequence", _routing(scores), documents) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_flows_through_the_share_alone(name):
    def loss(scores):
        return balance_loss(
            _routing(SCORES)._replace(scores_ME=scores),
            jnp.ones((1, 4), jnp.int32),
            _weights(name),
            FOUR,
        )

    scores = jnp.asarray(SCORES)
    gradient, step = np.asarray(jax.grad(loss)(scores)), 1e-3
    assert np.abs(gradient).max() > 0
    nudged = scores.at[1, 2].add(step)
    assert float(loss(nudged) - loss(scores)) / step == pytest.approx(
        gradient[1, 2], rel=2e-2, abs=1e-3
    )


def test_bias_update_lifts_the_idle_and_lowers_the_busy():
    bias = jnp.asarray([[6.5, 2.0, -1.0, 0.0]])
    got = update_bias(bias, jnp.asarray([[10, 0, 5, 5]]), 0.001)
    np.testing.assert_allclose(got - bias, [[-0.001, 0.001, 0, 0]], atol=3e-7)


def test_a_hundred_small_steps_add_up_in_float32():
    """Released biases lie near 6, where bfloat16 steps are thirty times gamma: there these steps
    would vanish.
    """
    bias = jnp.full((1, 2), 6.0)
    for _ in range(100):
        bias = update_bias(bias, jnp.asarray([[3, 1]]), 0.001)
    np.testing.assert_allclose(bias, [[5.9, 6.1]], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_one_document_unless_they_are_isolated(name):
    scores = np.random.default_rng(1).uniform(0.05, 0.95, (24, 4))
    packed = jnp.asarray([[1] * 5 + [2] * 7, [3] * 2 + [4] * 6 + [0] * 4], jnp.int32)
    rows = (packed > 0).astype(jnp.int32)
    routing = _routing(scores)
    want = balance_loss(routing, rows, _weights(name), FOUR)
    got = balance_loss(routing, packed, _weights(name, isolated=False), FOUR)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    assert float(got) != pytest.approx(
        float(balance_loss(routing, packed, _weights(name), FOUR)), rel=1e-3
    )


def test_max_violation_is_relative_to_the_mean():
    np.testing.assert_allclose(
        max_violation(jnp.asarray([[3, 3, 1, 1], [2, 2, 2, 2]])), [0.5, 0.0], atol=1e-7
    )


def test_max_violation_of_fewer_assignments_than_experts():
    """The mean load is below 1 then, and 0 where nothing is counted."""
    counts_LE = jnp.asarray([[2, 0, 0, 0, 0, 0, 0, 0], [0] * 8])
    np.testing.assert_allclose(max_violation(counts_LE), [7.0, 0.0], atol=1e-6)


def test_weights_come_from_the_config():
    train = TrainConfig(sequence_balance=0.25, device_balance=0.5)
    for isolated in (True, False):
        assert BalanceWeights.of(train, TINY, isolated=isolated) == BalanceWeights(
            0.25, 0.0, 0.5, 0.0, TINY.n_expert_groups, isolated
        )

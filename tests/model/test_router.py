"""The router against its worked examples, the oracle, and the properties that other ports broke."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.router import route, select, weigh
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY
from tests.oracles.experts import route as oracle_route

LOGITS = [0.5, -1.0, 1.2, 0.3, -0.2, 0.1, 0.9, -2.0]
V3 = dataclasses.replace(TINY, n_activated_experts=3)
V2 = dataclasses.replace(
    V3,
    score_func="softmax",
    group_score="max",
    norm_topk=False,
    router_bias=False,
    route_scale=16.0,
)
V1 = dataclasses.replace(V2, n_expert_groups=1, n_limited_groups=1, route_scale=1.0)


def _by_expert(routing, row=0):
    return dict(
        zip(
            np.asarray(routing.experts_MK[row]).tolist(),
            np.asarray(routing.weights_MK[row]),
            strict=True,
        )
    )


def test_v3_worked_example():
    bias = jnp.asarray([0, 0.3, -0.4, 0, 0.2, 0.05, 0, 0.1])
    got = _by_expert(route(jnp.asarray([LOGITS]), bias, V3))
    assert got == pytest.approx({4: 0.704439, 0: 0.974051, 5: 0.821510}, abs=2e-6)


def test_v2_worked_example():
    got = _by_expert(route(jnp.asarray([LOGITS]), None, V2))
    assert got == pytest.approx({2: 4.740731, 6: 3.512020, 3: 1.927438}, abs=5e-6)


@pytest.mark.parametrize("config", [V1, V2, V3], ids=["v1", "v2", "v3"])
def test_route_equals_oracle_under_strong_biases(config):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 8))
    bias = rng.uniform(-2, 2, 8) if config.router_bias else None
    routing = route(
        jnp.asarray(logits, jnp.float32),
        None if bias is None else jnp.asarray(bias, jnp.float32),
        config,
    )
    for row, logits_E in enumerate(logits):
        want = oracle_route(logits_E, bias, config)
        got = _by_expert(routing, row)
        assert got == pytest.approx(dict(zip(want.experts, want.weights, strict=True)), rel=1e-5)


def test_no_expert_outside_the_kept_groups_wins_when_all_biased_scores_are_negative():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(100, 8)), jnp.float32)
    config = dataclasses.replace(V3, n_limited_groups=2, n_activated_experts=4)
    experts = np.asarray(select(jax.nn.sigmoid(logits), jnp.full(8, -3.0), config))
    assert max(len(set(row // 2)) for row in experts) == 2


def test_v4_scores_are_roots_of_softplus():
    config = dataclasses.replace(
        V3, score_func="sqrtsoftplus", n_expert_groups=1, n_limited_groups=1, n_activated_experts=2
    )
    logits = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32) * 3
    got = route(jnp.asarray(logits), None, config)
    scores = np.sqrt(np.log1p(np.exp(logits.astype(np.float64))))
    for row, (experts, weights) in enumerate(zip(got.experts_MK, got.weights_MK, strict=True)):
        best = set(np.argsort(-scores[row])[:2].tolist())
        assert set(np.asarray(experts).tolist()) == best
        chosen = scores[row][np.asarray(experts)]
        assert_close(weights, chosen / chosen.sum() * config.route_scale, F32)


def test_bias_moves_the_choice_and_not_the_weights():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 8)), jnp.float32)
    even = route(logits, jnp.full(8, 5.0), V3)
    assert_close(even.weights_MK, route(logits, jnp.zeros(8), V3).weights_MK, F32, "weights")
    pushed = route(logits, jnp.zeros(8).at[7].set(9.0), V3)
    assert (np.asarray(pushed.experts_MK) == 7).any(axis=1).all()
    assert_close(pushed.weights_MK.sum(axis=1), np.full(50, 2.5), F32, "sums")


def test_replayed_experts_overrule_the_router_where_they_are_others():
    logits = jax.random.normal(jax.random.key(4), (9, 8))
    own = route(logits, jnp.zeros(8), V3)
    assert not own.overruled_M.any()
    replayed = own.experts_MK[:, ::-1]  # the same in another order
    replayed = replayed.at[3].set((replayed[3] + 1) % 8)
    np.testing.assert_array_equal(
        route(logits, jnp.zeros(8), V3, replayed).overruled_M, np.arange(9) == 3
    )


def test_replayed_experts_keep_gradients_through_the_weights():
    logits = jnp.asarray([LOGITS])
    choice = jnp.asarray([[1, 7, 3]], jnp.int32)
    got = route(logits, jnp.zeros(8), V3, choice)
    np.testing.assert_array_equal(got.experts_MK, choice)
    gradient = jax.grad(lambda x: route(x, jnp.zeros(8), V3, choice).weights_MK[0, 0])(logits)
    assert set(np.flatnonzero(np.asarray(gradient[0]))) == {1, 3, 7}


def test_gradients_of_the_weights_need_no_sort():
    """The scatter says that a token's experts differ."""
    scores, cotangent = (jax.random.uniform(jax.random.key(seed), (9, 8)) for seed in (5, 6))
    experts = jax.lax.top_k(scores, 3)[1]

    def total(scores, weights):
        return (weights(scores, experts, V3) * cotangent[:, :3]).sum()

    def by_comparison(scores, experts, config):
        hot = jax.nn.one_hot(experts, 8)
        weights = (hot * scores[:, None]).sum(axis=-1)
        return config.route_scale * weights / weights.sum(axis=-1, keepdims=True)

    gradient = jax.grad(total)
    assert_close(gradient(scores, weigh), gradient(scores, by_comparison), F32, "gradient")
    program = str(jax.make_jaxpr(gradient, static_argnums=1)(scores, weigh))
    assert "scatter-add" in program and "unique_indices=False" not in program

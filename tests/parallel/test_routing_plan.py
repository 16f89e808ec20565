"""Dispatch and combine: nothing lost, whatever the imbalance; gradients are the transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.parallel import routing_plan
from tests.closeness import F32, assert_close

TOKENS, EXPERTS, K, D = 37, 8, 3, 5


def _choice(kind):
    rng = np.random.default_rng(0)
    if kind == "even":
        return np.stack([rng.permutation(EXPERTS)[:K] for _ in range(TOKENS)]).astype(np.int32)
    return np.tile(
        np.arange(K, dtype=np.int32), (TOKENS, 1)
    )  # the same few experts for every token


@pytest.mark.parametrize("kind", ["even", "crowded"])
def test_dispatch_brings_each_token_to_each_of_its_experts(kind):
    choice = _choice(kind)
    plan = routing_plan.sort_by_expert(jnp.asarray(choice), EXPERTS)
    assert int(plan.sizes_E.sum()) == TOKENS * K
    rows = np.asarray(routing_plan.dispatch(jnp.arange(TOKENS, dtype=jnp.float32)[:, None], plan))[
        :, 0
    ]
    ends = np.cumsum(plan.sizes_E)
    for e, (start, end) in enumerate(zip(ends - plan.sizes_E, ends, strict=True)):
        np.testing.assert_array_equal(rows[start:end], np.flatnonzero((choice == e).any(axis=1)))


@pytest.mark.parametrize("n_experts", [EXPERTS, 2**29])  # both keys in one number, or not
def test_assignments_are_sorted_by_expert_then_by_token(n_experts):
    rng = np.random.default_rng(2)
    choice = rng.integers(0, n_experts, (TOKENS, K)).astype(np.int32)
    choice[rng.random(choice.shape) < 0.2] = n_experts - 1
    order = np.asarray(routing_plan._sort(jnp.asarray(choice.T), n_experts))
    choices, tokens = np.divmod(order, TOKENS)
    want = np.argsort(choice.reshape(-1), kind="stable")
    np.testing.assert_array_equal(tokens * K + choices, want)


@pytest.mark.parametrize("kind", ["even", "crowded"])
def test_combine_sums_what_each_expert_said(kind):
    rng = np.random.default_rng(1)
    choice, weights = _choice(kind), rng.normal(size=(TOKENS, K)).astype(np.float32)
    x_MD = rng.normal(size=(TOKENS, D)).astype(np.float32)
    gain_E = np.arange(1, EXPERTS + 1, dtype=np.float32)
    plan = routing_plan.sort_by_expert(jnp.asarray(choice), EXPERTS)

    def through(x_MD, weights):
        gain_A = jnp.repeat(gain_E, plan.sizes_E, total_repeat_length=TOKENS * K)
        gain_A *= routing_plan.dispatch_choices(weights.T, plan)
        return routing_plan.combine(routing_plan.dispatch(x_MD, plan) * gain_A[:, None], plan)

    def dense(x_MD, weights):
        return x_MD * (weights * gain_E[choice]).sum(axis=1, keepdims=True)

    got, backward = jax.vjp(through, jnp.asarray(x_MD), jnp.asarray(weights))
    want, want_backward = jax.vjp(dense, jnp.asarray(x_MD), jnp.asarray(weights))
    assert_close(got, want, F32, "combined")
    cotangent = jnp.asarray(rng.normal(size=(TOKENS, D)), jnp.float32)
    for name, g, w in zip(
        ("dx", "dweights"), backward(cotangent), want_backward(cotangent), strict=True
    ):
        assert_close(g, w, F32, name)

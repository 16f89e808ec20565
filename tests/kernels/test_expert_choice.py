"""The choice of experts in one kernel, interpreted, against the router's own operations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.expert_choice import Rule, expert_choice, fits
from dsjax.kernels.target import HOPPER, Target
from dsjax.model.router import route, rule_of
from tests.closeness import F32, assert_close
from tests.kernels.hopper import INTERPRETED
from tests.model.tiny import TINY

interpreted = jax.jit(
    functools.partial(expert_choice, interpret=INTERPRETED), static_argnames="rule"
)

# Experts, groups, groups that stay, experts of a token.
SIZES = [(56, 8, 4, 6), (64, 8, 3, 8), (12, 1, 1, 5), (24, 4, 4, 1)]


def config_of(sizes, **fields):
    E, groups, limited, top_k = sizes
    return dataclasses.replace(
        TINY,
        n_routed_experts=E,
        n_expert_groups=groups,
        n_limited_groups=limited,
        n_activated_experts=top_k,
        **fields,
    )


def chosen(logits, bias, config):
    """The experts of each token in the order of their numbers, and their weights."""
    parts = jnp.stack([logits - 3.0, jnp.ones_like(logits), jnp.full_like(logits, 2.0)])
    biases = None if bias is None else jnp.stack([-bias, bias])
    experts, weights = interpreted(parts, biases, jnp.int32(1), rule_of(config))
    order = np.argsort(experts, axis=1)
    return np.take_along_axis(np.asarray(experts), order, 1), np.take_along_axis(
        np.asarray(weights), order, 1
    )


def defined(logits, bias, config):
    routing = route(logits, bias, config)
    order = np.argsort(routing.experts_MK, axis=1)
    return tuple(
        np.take_along_axis(np.asarray(array), order, 1)
        for array in (routing.experts_MK, routing.weights_MK)
    )


@pytest.mark.parametrize(
    ("sizes", "group_score"),
    [(SIZES[0], "top2"), (SIZES[1], "max"), (SIZES[2], "max"), (SIZES[3], "top2")],
    ids=str,
)
def test_choice_equals_the_routers(sizes, group_score):
    rng = np.random.default_rng(sizes[0])
    config = config_of(sizes, group_score=group_score, norm_topk=True, route_scale=2.5)
    logits = jnp.asarray(rng.normal(size=(17, sizes[0])), jnp.float32)
    bias = jnp.asarray(rng.normal(size=sizes[0]), jnp.float32)
    (experts, weights), (wanted, wanted_weights) = (
        choose(logits, bias, config) for choose in (chosen, defined)
    )
    assert (experts == wanted).all()
    assert_close(weights, wanted_weights, F32, "weights")


def test_without_bias_and_normalisation():
    config = config_of(SIZES[0], norm_topk=False, route_scale=1.5)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 56)), jnp.float32)
    (experts, weights), (wanted, wanted_weights) = (
        choose(logits, None, config) for choose in (chosen, defined)
    )
    assert (experts == wanted).all()
    assert_close(weights, wanted_weights, F32, "weights")


def test_of_equal_scores_the_lower_numbers_are_chosen():
    config = config_of(SIZES[0], norm_topk=True)
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 2, (40, 56)), jnp.float32)
    experts, _ = chosen(logits, None, config)
    wanted, _ = defined(logits, None, config)
    assert (experts == wanted).all()


def test_scores_that_are_not_numbers_choose_experts_and_weigh_them_with_none():
    """What reads the chosen experts' matrices must find them in the layer's stack."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 56)), jnp.float32)
    logits = logits.at[0].set(jnp.nan).at[1, 20].set(jnp.nan)
    experts, weights = chosen(logits, None, config_of(SIZES[0], group_score="top2"))
    assert all(len(set(row)) == 6 and 0 <= min(row) and max(row) < 56 for row in experts.tolist())
    assert np.isnan(weights[0]).all() and np.isnan(weights[1][experts[1] == 20]).all()
    assert 20 in experts[1] and np.isfinite(weights[2]).all()


def test_kernel_is_for_hopper_and_for_scores_that_registers_hold():
    assert fits(256, HOPPER)
    assert not fits(2048, HOPPER)
    assert not fits(256, Target("gpu", (8, 0)))
    assert hash(Rule(6, 8, 4, True, True, 2.5))

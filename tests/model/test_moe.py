import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsjax.kernels import grouped_mixture, mixture_step
from dsjax.kernels.target import HOPPER, Target
from dsjax.model import router
from dsjax.model.layers import RMSNorm, rms_norm, stack
from dsjax.model.moe import MoE
from dsjax.model.parameters import initialize
from dsjax.precision.policy import Policy
from tests.closeness import BF16, F32, assert_close
from tests.model.test_mla import _tree
from tests.model.tiny import TINY
from tests.oracles.experts import moe as oracle_moe

apply = jax.jit(MoE.__call__)


def _module(config=TINY, compute=jnp.float32):
    module = initialize(MoE(config, Policy(compute)), jax.random.key(0))
    if config.router_bias:
        module.gate.bias.set_value(jnp.linspace(-2.0, 2.0, config.n_routed_experts))
    return module


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_moe_equals_oracle(shared):
    config = dataclasses.replace(TINY, n_shared_experts=shared)
    module = _module(config)
    x = np.random.default_rng(0).normal(size=(30, config.dim)).astype(np.float32)
    got, statistics, _ = apply(module, jnp.asarray(x)[None], jnp.ones((1, 30), jnp.int32), None)
    want, choices = oracle_moe(x.astype(np.float64), _tree(module), config)
    assert_close(got[0], want, F32, "mixture")
    counts = np.bincount(
        np.concatenate([c.experts for c in choices]), minlength=config.n_routed_experts
    )
    np.testing.assert_array_equal(statistics.counts_E, counts)


def test_bfloat16_moe_stays_near_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 30, TINY.dim)), jnp.bfloat16)
    documents = jnp.ones((1, 30), jnp.int32)
    want, *_ = apply(_module(), x.astype(jnp.float32), documents, None)
    got, *_ = apply(_module(compute=jnp.bfloat16), x, documents, None)
    assert got.dtype == jnp.bfloat16
    assert_close(got, want, BF16, "mixture")


def test_all_tokens_to_the_same_experts_drop_none():
    module = _module()
    module.gate.bias.set_value(jnp.asarray([99.0, 98.0, 0, 0, 0, 0, 0, 0]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 50, TINY.dim)), jnp.float32)
    got, statistics, _ = apply(module, x, jnp.ones((2, 50), jnp.int32), None)
    np.testing.assert_array_equal(statistics.counts_E, [100, 100, 0, 0, 0, 0, 0, 0])
    assert int(statistics.dropped_tokens) == 0
    want, _ = oracle_moe(np.asarray(x[0], np.float64), _tree(module), TINY)
    assert_close(got[0], want, F32, "mixture")


def test_padding_is_not_counted():
    x = jnp.ones((1, 10, TINY.dim))
    documents = jnp.asarray([[1] * 6 + [0] * 4], jnp.int32)
    _, statistics, _ = apply(_module(), x, documents, None)
    assert int(statistics.counts_E.sum()) == 6 * TINY.n_activated_experts


@pytest.mark.parametrize("tokens", [5, 40])
def test_tokens_added_to_a_cache_pass_through_their_own_layers_experts(tokens):
    """Few or many; the stack holds another layer's experts as well."""
    module, other = _module(), initialize(MoE(TINY, Policy(jnp.float32)), jax.random.key(1))
    both = jax.tree.map(lambda *layers: jnp.stack(layers), other.experts, module.experts)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, tokens, TINY.dim)), jnp.float32)
    got, chosen = jax.jit(lambda module, x: module.extend(x, both, jnp.int32(1)))(module, x)
    want, _, experts = apply(module, x, jnp.ones((1, tokens), jnp.int32), None)
    assert_close(got, want, F32, "mixture")
    np.testing.assert_array_equal(chosen, experts)


def test_a_tpu_uses_a_layers_experts_where_they_lie_in_the_stack():
    tpu = Policy(jnp.float32, Target("tpu", (5,)))
    layers = [initialize(MoE(TINY, tpu), jax.random.key(number)) for number in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(each.experts for each in layers))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, TINY.dim)), jnp.float32)
    assert stacked.stays_stacked
    with pltpu.force_tpu_interpret_mode():
        got, chosen = jax.jit(lambda moe: moe.extend(x, stacked, jnp.int32(1)))(layers[1])
    own = initialize(MoE(TINY, Policy(jnp.float32)), jax.random.key(1))
    want, _, experts = apply(own, x, jnp.ones((1, 40), jnp.int32), None)
    assert_close(got, want, F32, "mixture")
    np.testing.assert_array_equal(chosen, experts)


@pytest.fixture
def interpreted(monkeypatch):
    """Hopper's kernels of a decoding step, on any machine."""
    kernels = [(mixture_step, "normed_logits"), (router, "expert_choice")]
    for module in (mixture_step, grouped_mixture):
        kernels += [(module, "hidden_states"), (module, "mixed")]
    for module, name in kernels:
        run = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, run)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("tokens", [3, 5])
def test_step_on_a_hopper_equals_norm_experts_and_residual(tokens, score_func, interpreted):
    """Rows choose fewer matrices than there are, or more."""
    config = dataclasses.replace(TINY, dim=64, moe_inter_dim=64, score_func=score_func)
    norm = stack(RMSNorm(64, 1e-2), 2)
    moe = initialize(stack(MoE(config, Policy(jnp.bfloat16, HOPPER)), 2), jax.random.key(0))
    moe = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), moe)
    moe.gate.bias.set_value(jnp.linspace(-2.0, 2.0, 16).reshape(2, 8))
    norm.weight.set_value(jnp.linspace(0.5, 1.5, 128, dtype=jnp.bfloat16).reshape(2, 64))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(tokens, 1, 64)), jnp.bfloat16)
    assert moe.steps(x)
    got, chosen = jax.jit(moe.step)(x, norm, jnp.int32(1))
    own = jax.tree.structure(MoE(config, Policy(jnp.float32)))
    one = own.unflatten([leaf[1].astype(jnp.float32) for leaf in jax.tree.leaves(moe)])
    normed = rms_norm(x, norm.weight[1], 1e-2).astype(jnp.float32)
    want, _, experts = apply(one, normed, jnp.ones((tokens, 1), jnp.int32), None)
    assert_close((got - x).astype(jnp.float32), want, BF16, "mixture")
    np.testing.assert_array_equal(np.sort(chosen), np.sort(experts))


def test_step_is_for_few_tokens_in_bfloat16_on_a_hopper():
    config = dataclasses.replace(TINY, dim=64, moe_inter_dim=64)

    def steps(tokens=1, compute=jnp.bfloat16, target=HOPPER, fp8=None):
        declared = stack(MoE(config, Policy(compute, target, fp8)), 2)
        moe = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, compute), declared)
        return moe.steps(jnp.zeros((tokens, 1, 64), compute))

    assert steps() and steps(tokens=64)
    assert not steps(tokens=65)
    assert not steps(compute=jnp.float32)
    assert not steps(fp8="fp32")
    assert not steps(target=Target("gpu", (8, 0)))


def test_few_tokens_leave_the_other_experts_unread():
    """The program has room for a few experts besides its inputs, not for a layer of 256."""
    config = dataclasses.replace(TINY, n_routed_experts=256)
    module = stack(MoE(config, Policy(jnp.float32, Target("cpu"))), 3)

    def layers(module, x):
        def layer(carry, block):
            x, index = carry
            return (block.extend(x, module.experts, index)[0], index + 1), None

        return jax.lax.scan(layer, (x, jnp.int32(0)), module)[0][0]

    x = jax.ShapeDtypeStruct((2, 1, config.dim), jnp.float32)
    memory = jax.jit(layers).lower(module, x).compile().memory_analysis()
    one_expert = 4 * 3 * config.dim * config.moe_inter_dim
    assert memory.temp_size_in_bytes < 16 * one_expert

"""A MoE layer's step in four kernels, interpreted, against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import mixture_step
from dsjax.kernels.mixture_step import Chosen, Matrices
from dsjax.kernels.target import HOPPER, Target
from dsjax.precision.activations import limited, swiglu
from tests.closeness import BF16, F32, assert_close
from tests.kernels.hopper import INTERPRETED

L, E, D, F, K = 3, 6, 192, 128, 3
EPS = 1e-2  # so that a lost one shows
LEVELS = {jnp.float32: F32, jnp.bfloat16: BF16}


def operands(rows, dtype, n_shared):
    rng = np.random.default_rng(rows)

    def matrices(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), dtype)

    def experts(*leading, width):
        into, out = (*leading, D, width), (*leading, width, D)
        return Matrices(matrices(*into), matrices(*into), matrices(*out))

    return (
        jnp.asarray(0.3 * rng.normal(size=(rows, D)), dtype),
        jnp.asarray(rng.uniform(0.5, 1.5, (L, D)), dtype),
        matrices(L, D, E),
        experts(L, E, width=F),
        experts(L, width=n_shared * 64) if n_shared else None,
        # Nobody chooses expert 0, whose place among the hidden states holds anything.
        jnp.asarray([1 + rng.permutation(E - 1)[:K] for _ in range(rows)], jnp.int32),
        jnp.asarray(rng.uniform(0.2, 2.0, (rows, K)), jnp.float32),
    )


@functools.partial(jax.jit, static_argnames=("kernels", "limit"))
def computed(
    layer, x, norm, router, experts, shared, experts_MK, weights_MK, *, kernels, limit=0.0
):
    normed, parts = mixture_step.normed_logits(
        x, norm, router, layer, eps=EPS, interpret=INTERPRETED
    )
    chosen = Chosen(experts, shared, experts_MK, weights_MK, layer)
    hidden = kernels.hidden_states(
        normed, chosen, lambda gate, up: swiglu(*limited(gate, up, limit)), interpret=INTERPRETED
    )
    y = kernels.mixed(x, hidden, chosen, interpret=INTERPRETED)
    return normed, parts.sum(axis=0), y


def defined(layer, x, norm, router, experts, shared, experts_MK, weights_MK, limit=np.inf):
    """In float64."""
    every = x, norm, router, experts, shared, weights_MK
    x, norm, router, experts, shared, weights_MK = jax.tree.map(
        lambda array: np.asarray(array, np.float64), every
    )
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * norm[layer]

    def feed_forward(row, w_gate, w_up, w_down):
        gate, up = np.minimum(row @ w_gate, limit), np.clip(row @ w_up, -limit, limit)
        return gate / (1 + np.exp(-gate)) * up @ w_down

    y = x.copy()
    for m, chosen in enumerate(np.asarray(experts_MK)):
        for k, e in enumerate(chosen):
            y[m] += weights_MK[m, k] * feed_forward(normed[m], *(w[layer, e] for w in experts))
        if shared:
            y[m] += feed_forward(normed[m], *(w[layer] for w in shared))
    return normed, normed @ router[layer], y


def assert_equals_the_definition(kernels, rows, layer, n_shared, dtype):
    arrays = operands(rows, dtype, n_shared)
    got = computed(jnp.int32(layer), *arrays, kernels=kernels)
    assert got[0].dtype == got[2].dtype == dtype
    names = "normed", "logits", "output"
    for name, ours, wanted in zip(names, got, defined(layer, *arrays), strict=True):
        assert_close(ours.astype(jnp.float32), wanted, LEVELS[dtype], name)


def assert_limit_clamps_what_swiglu_reads(kernels):
    arrays = operands(2, jnp.float32, 1)
    got = computed(jnp.int32(1), *arrays, kernels=kernels, limit=0.3)
    assert_close(got[2], defined(1, *arrays, limit=0.3)[2], F32, "output")


@pytest.mark.parametrize("dtype", LEVELS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "layer", "n_shared"), [(1, 0, 1), (3, 2, 2), (3, 1, 0)])
def test_step_equals_the_definition(rows, layer, n_shared, dtype):
    assert_equals_the_definition(mixture_step, rows, layer, n_shared, dtype)


def test_limit_clamps_what_swiglu_reads():
    assert_limit_clamps_what_swiglu_reads(mixture_step)


def fits(rows=8, width=128, dtype=jnp.bfloat16, target=HOPPER, router=jnp.bfloat16, n_experts=6):
    matrix = jnp.zeros((1, 64, width), dtype)
    x = jax.ShapeDtypeStruct((rows, 64), jnp.bfloat16)
    return mixture_step.fits(x, jnp.zeros((1, 64, n_experts), router), [matrix], target)


def test_kernels_are_for_hopper_and_for_operands_of_two_bytes_in_whole_blocks():
    assert fits()
    assert not fits(rows=65)
    assert not fits(n_experts=257)
    assert not fits(width=96)
    assert not fits(dtype=jnp.float32)  # weights would have to be cast
    assert not fits(router=jnp.float32)
    assert not fits(target=Target("gpu", (8, 0)))


def test_small_weights_are_no_operands():
    x = jax.ShapeDtypeStruct((1, 64), jnp.bfloat16)
    small = (jnp.zeros((1, 64, 64), jnp.int8), jnp.zeros((1, 1, 64), jnp.bfloat16))
    assert not mixture_step.fits(x, jnp.zeros((1, 64, 6), jnp.bfloat16), [small], HOPPER)

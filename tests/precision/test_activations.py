"""What the backward pass keeps: the gradients of it, and its size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.precision.activations import (
    attention_linear,
    limited,
    swiglu,
    swiglu_grouped_linear,
    swiglu_linear,
)
from dsjax.precision.matmul import grouped_linear, linear
from dsjax.precision.policy import Policy
from tests.closeness import EXACT, F32, FP8, assert_close, relative_l2

M, F, D = 256, 384, 128
SIZES = jnp.asarray([100, 0, 156], jnp.int32)
WEIGHTS = jnp.asarray(np.random.default_rng(1).uniform(0.1, 2, M), jnp.float32)
SAVED = jax.checkpoint_policies.save_only_these_names("swiglu_input", "attention")


def _operands():
    rng = np.random.default_rng(0)
    gate, up = rng.normal(size=(2, M, F)).astype(np.float32)
    w = rng.normal(size=(3, F, D)).astype(np.float32) * 0.05
    dy = rng.normal(size=(M, D)).astype(np.float32) * 1e-3
    return jnp.asarray(gate), jnp.asarray(up), jnp.asarray(w), jnp.asarray(dy)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(function, operands, dy):
    value, backward = jax.vjp(function, *operands)
    return value, backward(dy)


def _both(kind):
    """Each function beside its plain composition, with its operands and dy."""
    policy = Policy(jnp.float32, fp8=kind)
    gate, up, w, dy = _operands()
    return {
        "dense": (
            lambda g, u, w: swiglu_linear(g, u, w, policy),
            lambda g, u, w: linear(swiglu(g, u), w, policy),
            (gate, up, w[0]),
            dy,
        ),
        "grouped": (
            lambda g, u, w: swiglu_grouped_linear(g, u, WEIGHTS, w, SIZES, policy),
            lambda g, u, w: grouped_linear(swiglu(g, u) * WEIGHTS[:, None], w, SIZES, policy),
            (gate, up, w),
            dy,
        ),
        "attention": (
            lambda x, w: attention_linear(x, w, policy),
            lambda x, w: linear(x, w, policy),
            (gate, w[0]),
            dy,
        ),
    }


LAYERS = ["dense", "grouped", "attention"]


@pytest.mark.parametrize("layer", LAYERS)
def test_without_fp8_gradients_are_those_of_the_composition(layer):
    function, plain, operands, dy = _both(None)[layer]
    got, gradients = _value_and_gradients(function, operands, dy)
    want, plain_gradients = _value_and_gradients(plain, operands, dy)
    assert_close(got, want, EXACT, "forward")
    for g, w in zip(gradients, plain_gradients, strict=True):
        assert_close(g, w, F32, "gradient")


def test_limit_clamps_the_gate_from_above_and_the_other_on_both_sides():
    gate, up = jnp.asarray([-9.0, 1.0, 9.0]), jnp.asarray([-9.0, 9.0, 1.0])
    assert limited(gate, up, 0.0) == (gate, up)
    clamped = limited(gate, up, 2.0)
    assert [x.tolist() for x in clamped] == [[-9.0, 1.0, 2.0], [-2.0, 2.0, 1.0]]


def test_a_row_s_weight_may_come_after_the_product():
    policy, (gate, up, w, dy) = Policy(jnp.float32), _operands()

    def after(gate, up, weights, w):
        return grouped_linear(swiglu(gate, up), w, SIZES, policy) * weights[:, None]

    operands = gate, up, WEIGHTS, w
    before = functools.partial(swiglu_grouped_linear, sizes_E=SIZES, policy=policy)
    got, gradients = _value_and_gradients(before, operands, dy)
    want, wanted_gradients = _value_and_gradients(after, operands, dy)
    assert_close(got, want, F32, "forward")
    for name, g, w in zip(("gate", "up", "weights", "w"), gradients, wanted_gradients, strict=True):
        assert_close(g, w, F32, name)


@pytest.mark.parametrize("kind", ["fp32", "pow2"])
@pytest.mark.parametrize("layer", LAYERS)
def test_fp8_storage_changes_gradients_alone_and_little(layer, kind):
    function, plain, operands, dy = _both(kind)[layer]
    got, gradients = _value_and_gradients(function, operands, dy)
    want, plain_gradients = _value_and_gradients(plain, operands, dy)
    assert_close(got, want, EXACT, "forward")
    errors = [relative_l2(g, w) for g, w in zip(gradients, plain_gradients, strict=True)]
    # The factors of dgate are as exact as E4M3, and SwiGLU's slope magnifies their error a little.
    assert max(errors) < 1.5 * FP8.bound
    # They come from what was kept: all but the input gradient of the layer after attention.
    assert sum(error > 0 for error in errors) == (1 if layer == "attention" else 3)


def _kept_bytes(function, *operands):
    """Bytes that a rematerialised function keeps besides the matrix and the sizes."""

    def saving(*operands):
        # A layer before makes what is to be kept, so that it is not an operand itself.
        *activations, w = operands
        return function(*(2 * x for x in activations), w)

    saving = jax.checkpoint(saving, policy=SAVED)
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(saving, *args)[1], *operands))
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.dtype != jnp.int32]
    return sum(sizes) - operands[-1].nbytes


@pytest.mark.parametrize("layer", LAYERS)
def test_kept_bytes_are_those_of_the_formats(layer):
    tile_scales = 4 * M * F // 128
    fp8, e5m6 = M * F + tile_scales, M * F * 3 // 2 + tile_scales
    want = {None: M * F * 4, "pow2": e5m6 if layer == "attention" else fp8}
    for kind, bytes_an_activation in want.items():
        function, _, operands, _ = _both(kind)[layer]
        wanted = bytes_an_activation * (len(operands) - 1)
        wanted += WEIGHTS.nbytes if layer == "grouped" else 0
        assert _kept_bytes(function, *operands) == wanted, kind

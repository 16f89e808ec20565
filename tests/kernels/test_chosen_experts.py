"""The experts that tokens chose against one token and one expert after another."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import hopper_grouped
from dsjax.kernels.chosen_experts import chosen_experts, grouped_in_place, is_faster
from dsjax.kernels.target import HOPPER, Target
from dsjax.precision.activations import limited, swiglu
from tests.closeness import BF16, F32, assert_close
from tests.oracles.kernels import reference_matmul

E, D, F, K = 12, 16, 24, 3


@functools.partial(jax.jit, static_argnames=("target", "limit"))
def compute(*operands, target, limit=0.0):
    return chosen_experts(
        *operands,
        target,
        lambda w, dtype: w.astype(dtype),
        lambda gate, up: swiglu(*limited(gate, up, limit)),
        n_experts=E,
    )


def _operands(tokens, dtype=jnp.float32):
    rng = np.random.default_rng(tokens)
    stacks = [rng.normal(size=shape) for shape in ((E, D, F), (E, D, F), (E, F, D))]
    experts = np.stack([rng.permutation(E)[:K] for _ in range(tokens)])
    x, *stacks = (jnp.asarray(array, dtype) for array in (rng.normal(size=(tokens, D)), *stacks))
    weights = jnp.asarray(rng.uniform(size=(tokens, K)), jnp.float32)
    return x, *stacks, jnp.asarray(experts, jnp.int32), weights


def _definition(x_MD, w_gate, w_up, w_down, experts_MK, weights_MK, limit=np.inf):
    """In float64."""
    x_MD, w_gate, w_up, w_down, weights_MK = (
        np.asarray(array, np.float64) for array in (x_MD, w_gate, w_up, w_down, weights_MK)
    )
    y_MD = np.zeros_like(x_MD)
    for m, experts in enumerate(np.asarray(experts_MK)):
        for k, e in enumerate(experts):
            gate, up = np.minimum(x_MD[m] @ w_gate[e], limit), x_MD[m] @ w_up[e]
            hidden = gate / (1 + np.exp(-gate)) * np.clip(up, -limit, limit)
            y_MD[m] += weights_MK[m, k] * (hidden @ w_down[e])
    return y_MD


@pytest.mark.parametrize("target", [Target("cpu"), Target("gpu")], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 9, 33])
def test_chosen_experts_equal_the_definition(tokens, target):
    operands = _operands(tokens)
    got = compute(*operands, target=target)
    assert_close(got, _definition(*operands), F32, "experts")


@pytest.fixture
def no_kernel(monkeypatch):
    """The definition in the place of Hopper's grouped product, whose own tests run it."""

    def matmul(x_AD, w_EDF, sizes_E, dtype, *, first_group, multiprocessors):
        assert multiprocessors == HOPPER.multiprocessors
        w_EDF = jax.lax.dynamic_slice_in_dim(w_EDF, first_group, len(sizes_E))
        return reference_matmul(x_AD, w_EDF, sizes_E).astype(dtype)

    monkeypatch.setattr(hopper_grouped, "matmul", matmul)


@pytest.mark.parametrize("layer", [0, 2])
def test_hopper_reads_a_layers_experts_from_the_stack_of_all(layer, no_kernel):
    rng = np.random.default_rng(layer)
    shapes = (3 * E, 64, 128), (3 * E, 64, 128), (3 * E, 128, 64)
    stacks = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    x = jnp.asarray(rng.normal(size=(9, 64)), jnp.bfloat16)
    experts, weights = _operands(9)[4:]
    assert grouped_in_place(x.dtype, stacks, HOPPER)
    operands = x, *stacks, experts + layer * E, weights
    got = compute(*operands, target=HOPPER)
    assert_close(got, _definition(*operands), BF16, "experts")


@pytest.mark.parametrize("experts", [[3, 4, 5], [11, 0, 6]])
def test_experts_that_all_tokens_chose_take_several_blocks(experts):
    x, *stacks, _, weights = _operands(33)
    experts_MK = jnp.broadcast_to(jnp.asarray(experts, jnp.int32), weights.shape)
    operands = x, *stacks, experts_MK, weights
    got = compute(*operands, target=Target("cpu"))
    assert_close(got, _definition(*operands), F32, "experts")


def test_few_tokens_choose_the_same_experts_of_a_later_layer():
    rng = np.random.default_rng(0)
    shapes = (3 * E, D, F), (3 * E, D, F), (3 * E, F, D)
    stacks = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    x, *_, weights = _operands(4)
    experts_MK = jnp.asarray([[3, 4, 5], [5, 3, 4], [3, 11, 5], [0, 5, 3]], jnp.int32) + 2 * E
    operands = x, *stacks, experts_MK, weights
    got = compute(*operands, target=Target("cpu"))
    assert_close(got, _definition(*operands), F32, "experts")


def _large(tokens):
    """Operands whose products a CPU runs beside each other."""
    rng = np.random.default_rng(tokens)
    stacks = [rng.normal(size=shape) for shape in ((5, 512, 256), (5, 512, 256), (5, 256, 512))]
    experts = np.stack([rng.permutation(5)[:K] for _ in range(tokens)])
    x, *stacks = (
        jnp.asarray(array, jnp.float32) for array in (rng.normal(size=(tokens, 512)), *stacks)
    )
    weights = jnp.asarray(rng.uniform(size=(tokens, K)), jnp.float32)
    return x, *stacks, jnp.asarray(experts, jnp.int32), weights


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_products_beside_each_other_equal_the_definition(tokens):
    operands = _large(tokens)
    got = compute(*operands, target=Target("cpu"))
    assert_close(got, _definition(*operands), F32, "experts")


def test_products_beside_each_other_read_the_same_values():
    """One that had values of its own could not begin before another had read its own."""
    program = compute.lower(*_large(1), target=Target("cpu")).compile().as_text()
    calls = re.findall(r"custom-call\((.*?)\).*csr_sparse", str(program))
    read = [(values, columns) for values, _, columns, _ in (call.split(", ") for call in calls)]
    assert len(read) == 5  # two of the tokens, two halves of the outputs, and their sum
    assert len(set(read)) == 3


@pytest.mark.parametrize("target", [Target("cpu"), Target("gpu")], ids=str)
def test_limit_clamps_gates_from_above_and_the_other_on_both_sides(target):
    operands = _operands(2)
    got = compute(*operands, target=target, limit=0.7)
    assert_close(got, _definition(*operands, limit=0.7), F32, "experts")


def test_one_choice_of_one_token():
    x, *stacks, experts, weights = _operands(1)
    operands = x, *stacks, experts[:, :1], weights[:, :1]
    assert_close(compute(*operands, target=Target("cpu")), _definition(*operands), F32, "expert")


@pytest.mark.parametrize("target", [Target("cpu"), Target("gpu")], ids=str)
def test_float32_stacks_serve_bfloat16_tokens(target):
    x, *stacks, experts, weights = _operands(4)
    got = compute(x.astype(jnp.bfloat16), *stacks, experts, weights, target=target)
    assert got.dtype == jnp.bfloat16
    assert_close(got, _definition(x, *stacks, experts, weights), BF16, "experts")


def _temporary_bytes(tokens, n_stacked, width):
    compiled = compute.lower(
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        *(jax.ShapeDtypeStruct((n_stacked, width, width), jnp.float32),) * 3,
        jax.ShapeDtypeStruct((tokens, K), jnp.int32),
        jax.ShapeDtypeStruct((tokens, K), jnp.float32),
        target=Target("cpu"),
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_no_array_of_every_expert_is_made():
    """What lies between reading the stacks and the result is a few matrices, not all of them."""
    assert _temporary_bytes(tokens=5, n_stacked=512, width=64) < 8 * 4 * 64 * 64


def test_few_float32_tokens_copy_no_matrix():
    assert _temporary_bytes(tokens=4, n_stacked=24, width=256) < 4 * 256 * 256


def test_a_gpu_reads_in_place_no_more_matrices_than_there_are():
    assert is_faster(7, top_k=8, n_experts=56, target=Target("gpu"))
    assert not is_faster(8, top_k=8, n_experts=56, target=Target("gpu"))
    assert is_faster(8, top_k=8, n_experts=56, target=HOPPER, in_place=True)
    assert is_faster(4096, top_k=8, n_experts=56, target=Target("cpu"))
    assert not is_faster(1, top_k=8, n_experts=256, target=Target("tpu"))


@pytest.mark.parametrize(
    ("dtype", "width", "target"),
    [
        (jnp.bfloat16, 100, HOPPER),  # the kernel's tiles do not divide it
        (jnp.float32, 128, HOPPER),  # weights would have to be cast, all of them
        (jnp.bfloat16, 128, Target("gpu", (8, 0))),
    ],
)
def test_stacks_that_no_grouped_product_reads_in_place(dtype, width, target):
    stack = jnp.zeros((2, 64, width), dtype)
    assert not grouped_in_place(jnp.bfloat16, [stack], target)


def test_small_weights_are_not_read_in_place_by_the_grouped_product():
    small = (jnp.zeros((2, 64, 128), jnp.int8), jnp.zeros((2, 1, 128), jnp.float32))
    assert not grouped_in_place(jnp.bfloat16, [small], HOPPER)

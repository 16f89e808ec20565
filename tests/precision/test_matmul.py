"""The three products of a linear layer: values, gradients and types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.kernels import hopper_scaled
from dsjax.kernels.target import HOPPER, Target
from dsjax.precision import hopper_quantize
from dsjax.precision.matmul import (
    float32_matmul,
    grouped_backward,
    grouped_linear,
    linear,
    vocabulary_logits,
)
from dsjax.precision.policy import Policy
from tests.closeness import BF16, F32, FP8, assert_close, relative_l2
from tests.oracles import fp8 as oracle

SIZES = [7, 0, 33]


def _operands():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), 24)).astype(np.float32)
    w = rng.normal(size=(len(SIZES), 24, 16)).astype(np.float32)
    dy = rng.normal(size=(sum(SIZES), 16)).astype(np.float32)
    return x, w, dy


def _products(function, x, w, dy):
    """The function's value, and its gradients for x and w, from one program."""

    @jax.jit
    def products(x, w, dy):
        y, backward = jax.vjp(function, x, w)
        return y, *backward(dy.astype(y.dtype))

    return products(*map(jnp.asarray, (x, w, dy)))


@pytest.mark.parametrize(("compute", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_linear_products_equal_float64(compute, level):
    x, w, dy = _operands()
    y, dx, dw = _products(lambda x, w: linear(x, w, Policy(compute)), x, w[0], dy)
    assert y.dtype == compute
    # A weight gradient rounded to bfloat16 would lose what many micro-batches add up.
    assert dx.dtype == dw.dtype == jnp.float32
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    assert_close(y, x @ w[0], level, "forward")
    assert_close(dx, dy @ w[0].T, level, "input gradient")
    assert_close(dw, x.T @ dy, level, "weight gradient")


@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24)])
@pytest.mark.parametrize(("compute", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_single_row_on_hopper_equals_float64(compute, level, shape):
    x, w, _ = _operands()
    policy = Policy(compute, HOPPER)
    y = jax.jit(lambda x, w: linear(x, w, policy))(x[0].reshape(shape), w[0])
    assert y.dtype == compute and y.shape == (*shape[:-1], 16)
    assert_close(y.reshape(-1), x[0].astype(np.float64) @ w[0], level, "forward")


def test_single_row_on_hopper_is_no_matrix_product_and_several_are():
    policy, w = Policy(jnp.bfloat16, HOPPER), jnp.zeros((24, 16), jnp.bfloat16)
    one, two = (
        str(jax.make_jaxpr(lambda x: linear(x, w, policy))(jnp.zeros((rows, 24), jnp.bfloat16)))
        for rows in (1, 2)
    )
    assert "dot_general" not in one and "dot_general" in two


@pytest.mark.parametrize(("compute", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_grouped_linear_products_equal_float64(compute, level):
    x, w, dy = _operands()
    sizes = jnp.asarray(SIZES, jnp.int32)
    y, dx, dw = _products(lambda x, w: grouped_linear(x, w, sizes, Policy(compute)), x, w, dy)
    assert y.dtype == compute and dx.dtype == dw.dtype == jnp.float32
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    groups = np.repeat(np.arange(len(SIZES)), SIZES)
    assert_close(y, np.einsum("ad,adf->af", x, w[groups]), level, "forward")
    assert_close(dx, np.einsum("af,adf->ad", dy, w[groups]), level, "input gradient")
    want = np.stack([x[groups == e].T @ dy[groups == e] for e in range(len(SIZES))])
    assert_close(dw, want, level, "weight gradient")


def test_bfloat16_weight_gradient_keeps_what_rounding_would_lose():
    """Many small rows: adding them up in bfloat16 stalls, in float32 it does not."""
    x, dy = np.ones((4096, 8), np.float32), np.full((4096, 8), 1e-3, np.float32)
    policy = Policy(jnp.bfloat16)
    *_, dw = _products(lambda x, w: linear(x, w, policy), x, np.ones((8, 8), np.float32), dy)
    want = 4096 * float(jnp.bfloat16(1e-3))
    np.testing.assert_allclose(dw, want, rtol=1e-5)


def test_logits_and_router_products_are_float32():
    x, w, _ = _operands()
    x16 = jnp.asarray(x, jnp.bfloat16)
    assert vocabulary_logits(x16, jnp.asarray(w[0]), Policy(jnp.bfloat16)).dtype == jnp.float32
    product = float32_matmul(x16, jnp.asarray(w[0]))
    assert_close(
        product, np.asarray(x16, np.float64) @ w[0].astype(np.float64), F32, "router product"
    )


FP8_SIZES = [130, 0, 259, 11]
_TYPES = (jnp.bfloat16, jnp.float32, jnp.bfloat16)  # of x, w, dy in training


def _fp8_operands(rows, groups=1, dim=300, width=200):
    """Rows of very different sizes, as tokens and their gradients are; all ragged."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, dim)) * np.exp2(rng.uniform(-4, 4, (rows, 1)))
    dy = rng.normal(size=(rows, width)) * np.exp2(rng.uniform(-9, -3, (rows, 1)))
    w = rng.normal(size=(groups, dim, width)) * 0.02
    return tuple(a.astype(np.float32) for a in (x, w, dy))


def _round_trip(x, block, kind):
    """What is left of a matrix after the oracle's quantisation, float64."""
    return oracle.dequantize(*oracle.quantize(x, block, kind), block).astype(np.float64)


def _fp8_products(x, w, dy, kind):
    """The three products of one matrix from the definition, float64."""
    weight = _round_trip(w, (128, 128), kind)
    y = _round_trip(x, (1, 128), kind) @ weight
    dx = _round_trip(dy, (1, 128), kind) @ weight.T
    return y, dx, _round_trip(x, (128, 1), kind).T @ _round_trip(dy, (128, 1), kind)


@pytest.mark.parametrize(
    ("kind", "compute", "native"),
    [
        ("fp32", jnp.float32, False),
        ("pow2", jnp.bfloat16, False),
        ("fp32", jnp.float32, True),
        ("pow2", jnp.bfloat16, True),
    ],
)
def test_fp8_linear_products_equal_their_definition(kind, compute, native):
    x, w, dy = _fp8_operands(200)
    policy = Policy(compute, fp8=kind, native_fp8=native)
    if compute == jnp.bfloat16:
        x, dy = (np.asarray(jnp.asarray(a, compute), np.float32) for a in (x, dy))
    # Leading dimensions of x are tokens all the same.
    shape = (4, 50, -1)
    got = _products(lambda x, w: linear(x, w, policy), x.reshape(shape), w[0], dy.reshape(shape))
    assert got[0].dtype == compute and got[1].dtype == got[2].dtype == jnp.float32
    want = _fp8_products(x, w[0], dy, kind)
    levels = (F32, F32, F32) if compute == jnp.float32 else (BF16, BF16, F32)
    for g, wanted, level, name in zip(got, want, levels, ["forward", "dx", "dw"], strict=True):
        assert_close(g.reshape(wanted.shape), wanted, level, name)


@pytest.mark.parametrize("kind", ["fp32", "pow2"])
def test_fp8_linear_stays_within_the_fp8_band(kind):
    x, w, dy = _fp8_operands(384, dim=512, width=256)
    got = _products(lambda x, w: linear(x, w, Policy(jnp.float32, fp8=kind)), x, w[0], dy)
    x, w, dy = (a.astype(np.float64) for a in (x, w[0], dy))
    for g, want, name in zip(
        got, (x @ w, dy @ w.T, x.T @ dy), ["forward", "dx", "dw"], strict=True
    ):
        assert_close(g, want, FP8, name)


@pytest.mark.parametrize(("kind", "native"), [("pow2", False), ("fp32", True)])
def test_fp8_grouped_linear_products_equal_their_definition(kind, native):
    """Each expert's products are those of a `linear` of its own, so no tile holds two experts."""
    x, w, dy = _fp8_operands(sum(FP8_SIZES), groups=len(FP8_SIZES))
    sizes = jnp.asarray(FP8_SIZES, jnp.int32)
    policy = Policy(jnp.float32, fp8=kind, native_fp8=native)
    y, dx, dw = _products(lambda x, w: grouped_linear(x, w, sizes, policy), x, w, dy)
    groups = np.repeat(np.arange(len(FP8_SIZES)), FP8_SIZES)
    for e in range(len(FP8_SIZES)):
        mine = groups == e
        want = _fp8_products(x[mine], w[e], dy[mine], kind)
        for got, wanted, name in zip(
            (y[mine], dx[mine], dw[e]), want, ["y", "dx", "dw"], strict=True
        ):
            assert_close(got, wanted, F32, f"{name} of expert {e}")


@pytest.mark.parametrize("native", [False, True])
def test_fp8_tiles_every_dimension(native):
    """A dimension that is no multiple of a block ends in a smaller one, so none is refused."""
    x, w, dy = _fp8_operands(3, dim=1, width=129)
    policy = Policy(jnp.float32, fp8="fp32", native_fp8=native)
    got = _products(lambda x, w: linear(x, w, policy), x, w[0], dy)
    for g, want in zip(got, _fp8_products(x, w[0], dy, "fp32"), strict=True):
        assert_close(g, want, F32, "product")


@pytest.mark.parametrize(
    ("target", "lowered_for"), [(Target("gpu", (10, 0)), "cuda"), (Target("tpu", (7,)), "tpu")]
)
def test_native_products_multiply_e4m3_and_nothing_else(target, lowered_for):
    """Read from the program for another machine, which need not be here."""
    policy = Policy(jnp.bfloat16, target, fp8="fp32")
    sizes = jnp.asarray(FP8_SIZES, jnp.int32)

    def products(x, w, dy):
        one, backward = jax.vjp(lambda x, w: linear(x, w, policy), x, w[0])
        experts, experts_backward = jax.vjp(lambda x, w: grouped_linear(x, w, sizes, policy), x, w)
        return one, backward(dy), experts, experts_backward(dy)

    operands = _fp8_operands(sum(FP8_SIZES), groups=len(FP8_SIZES))
    x, w, dy = (jnp.asarray(a, t) for a, t in zip(operands, _TYPES, strict=True))
    lowered = jax.jit(products).trace(x, w, dy).lower(lowering_platforms=(lowered_for,)).as_text()
    dots = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(dots) == 6 and "ragged_dot" not in lowered
    for dot in dots:
        assert dot.count("f8E4M3FN>") == 2 and dot.endswith("xf32>"), dot


@pytest.fixture
def kernels_run(monkeypatch):
    """The names of the Hopper kernels that ran, here interpreted."""
    names = []

    def interpreted(name, kernel, *operands, **options):
        names.append(name)
        return kernel(*operands, **options | {"interpret": True})

    products = "matmul", "grouped_matmul", "grouped_outer"
    quantising = "quantize_rows", "quantize_weights"
    for module, kernels in ((hopper_scaled, products), (hopper_quantize, quantising)):
        for name in kernels:
            kernel = functools.partial(interpreted, name, getattr(module, name))
            monkeypatch.setattr(module, name, kernel)
    return names


@pytest.mark.parametrize(("kind", "compute"), [("fp32", jnp.float32), ("pow2", jnp.bfloat16)])
def test_fp8_linear_products_by_hopper_kernels_equal_their_definition(kind, compute, kernels_run):
    x, w, dy = _fp8_operands(160)
    policy, shape = Policy(compute, HOPPER, fp8=kind), (4, 40, -1)
    if compute == jnp.bfloat16:
        x, dy = (np.asarray(jnp.asarray(a, compute), np.float32) for a in (x, dy))
    got = _products(lambda x, w: linear(x, w, policy), x.reshape(shape), w[0], dy.reshape(shape))
    product = ["matmul", "grouped_matmul"]  # each is one of a single group
    both = ["quantize_weights", "quantize_rows", *product]
    assert kernels_run == [*both, *both, "quantize_rows", *product]
    assert got[0].dtype == compute and got[1].dtype == got[2].dtype == jnp.float32
    levels = (F32, F32, F32) if compute == jnp.float32 else (BF16, BF16, F32)
    for g, want, level in zip(got, _fp8_products(x, w[0], dy, kind), levels, strict=True):
        assert_close(g.reshape(want.shape), want, level, "product")


def test_fp8_grouped_linear_products_by_hopper_kernels_equal_their_definition(kernels_run):
    sizes = [130, 0, 11]
    x, w, dy = _fp8_operands(sum(sizes), groups=len(sizes))
    policy, sizes_E = Policy(jnp.float32, HOPPER, fp8="fp32"), jnp.asarray(sizes, jnp.int32)
    y, dx, dw = _products(lambda x, w: grouped_linear(x, w, sizes_E, policy), x, w, dy)
    assert kernels_run == [
        *("quantize_weights", "quantize_rows", "grouped_matmul"),
        *("quantize_weights", "quantize_rows", "quantize_rows", "grouped_matmul", "grouped_outer"),
    ]
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for e in range(len(sizes)):
        mine = groups == e
        want = _fp8_products(x[mine], w[e], dy[mine], "fp32")
        for got, wanted in zip((y[mine], dx[mine], dw[e]), want, strict=True):
            assert_close(got, wanted, F32, f"product of expert {e}")


def test_rows_of_two_billion_numbers_are_left_to_the_definition(kernels_run, monkeypatch):
    """Their places exceed the 32 bits that kernels count in; traced only."""
    sizes, quantize = [], hopper_quantize.quantize_rows

    def noting(rows, *operands, **options):
        sizes.append(rows.size)
        return quantize(rows, *operands, **options)

    monkeypatch.setattr(hopper_quantize, "quantize_rows", noting)
    policy, shapes = Policy(jnp.bfloat16, HOPPER, fp8="pow2"), ((2**20, 2048), (2, 2048, 128))
    x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (*shapes, (2**20, 128)))
    groups = jax.ShapeDtypeStruct((2,), jnp.int32)
    jax.eval_shape(lambda x, w, n, dy: grouped_backward(policy, (x, w, n), dy), x, w, groups, dy)
    assert "grouped_matmul" in kernels_run and sizes and max(sizes) < 2**31


def test_hopper_kernels_are_not_for_meshes_that_the_compiler_splits(kernels_run):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w, _ = map(jnp.asarray, _fp8_operands(2, dim=8, width=8))
    with jax.set_mesh(mesh):
        jax.make_jaxpr(lambda x, w: linear(x, w, Policy(target=HOPPER, fp8="fp32")))(x, w[0])
    assert not kernels_run


@pytest.mark.parametrize("target", [Target("cpu"), HOPPER], ids=lambda target: target.kind)
def test_native_products_run_inside_shard_map(target):
    """As the experts of several devices do: the loops' sums differ from device to device."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    policy = Policy(jnp.float32, target, fp8="fp32", native_fp8=True)
    x, w, dy = map(jnp.asarray, _fp8_operands(400, groups=2))

    def products(x, w, dy):
        sizes = jnp.asarray([x.shape[0]], jnp.int32)
        one, backward = jax.vjp(lambda x, w: linear(x, w, policy), x, w[0])
        experts, experts_backward = jax.vjp(lambda x, w: grouped_linear(x, w, sizes, policy), x, w)
        dx, dw = experts_backward(dy)
        return one + experts, backward(dy)[0] + dx, backward(dy)[1][None] + dw

    split = jax.shard_map(products, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    want = jax.eval_shape(lambda *operands: operands, dy, x, w)  # traced, not run
    assert jax.tree.map(jnp.shape, jax.eval_shape(split, x, w, dy)) == jax.tree.map(jnp.shape, want)


@pytest.mark.gpu
@pytest.mark.tpu
@pytest.mark.parametrize("kind", ["fp32", "pow2"])
def test_native_products_on_this_device_are_near_their_definition(kind):
    """A Hopper accumulator of 14 bits is off by 0.1 % (`docs/fp8_accumulation.md`)."""
    if not Target.here().multiplies_e4m3:
        pytest.skip(f"{jax.devices()[0].device_kind} has no E4M3 units")
    x, w, dy = _fp8_operands(512, dim=1024, width=384)
    policy = Policy(jnp.float32, fp8=kind)
    assert policy.native_fp8
    got = _products(lambda x, w: linear(x, w, policy), x, w[0], dy)
    for g, want in zip(got, _fp8_products(x, w[0], dy, kind), strict=True):
        assert relative_l2(g, want) < 2e-3

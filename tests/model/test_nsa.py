"""Native sparse attention against its definition, packed, cached and split."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import native_sparse
from dsjax.model import flops, rope
from dsjax.model.cache import empty_cache
from dsjax.model.layer_cache import LayerCache
from dsjax.model.nsa import NSA
from dsjax.model.parameters import declarations, initialize, shardings
from dsjax.parallel import context
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from tests.closeness import F32, assert_close
from tests.golden.ours import QUICK
from tests.model.test_mla import _tree
from tests.model.tiny import TINY
from tests.oracles.nsa import nsa as oracle

CONFIG = dataclasses.replace(
    TINY, attention="nsa", n_kv_heads=2, head_dim=8, v_head_dim=6, n_mtp=0, init_std=0.3,
    nsa_length=8, nsa_stride=4, nsa_block=8, nsa_count=4, nsa_window=6,
)  # fmt: skip
LENGTH = 64
SEGMENTS = np.repeat([1, 2, 3], (5, 42, 17)).astype(np.int32)


@functools.cache
def module(config=CONFIG):
    return initialize(NSA(config, Policy(jnp.float32)), jax.random.key(0))


def hidden(rows=1, length=LENGTH):
    return np.random.default_rng(0).normal(size=(rows, length, CONFIG.dim))


def attend(module, x, segments=None):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    if segments is not None:
        positions = rope.positions_in_segments(segments)
    return module(x, rope.angles(positions, module.config), segments)


def run(module, x, segments=None):
    # A new function, so that nothing is kept of what another test has patched.
    return jax.jit(lambda *given: attend(*given), compiler_options=QUICK)(module, x, segments)


@pytest.mark.parametrize(
    "changes",
    [{}, {"nsa_length": 12, "nsa_block": 16, "nsa_count": 3, "nsa_window": 11}],
    ids=["even", "uneven"],
)
@pytest.mark.parametrize("way", ["masked", "gathered"])
@pytest.mark.parametrize("segments", [np.ones(LENGTH, np.int32), SEGMENTS], ids=["whole", "packed"])
def test_nsa_equals_oracle(changes, way, segments, monkeypatch):
    monkeypatch.setattr(native_sparse, "_DENSE", 0 if way == "gathered" else 100)
    config = dataclasses.replace(CONFIG, **changes)
    attention, x = module(config), hidden()
    got = run(attention, jnp.asarray(x, jnp.float32), jnp.asarray(segments)[None])
    assert_close(got[0], oracle(x[0], _tree(attention), config, segments), F32, "attention")


@pytest.mark.parametrize("size", [16, 1])
def test_bfloat16_runs_on_a_cpu(size):
    """Its runtime, in jax 0.10, lacks some products of bfloat16."""
    attention = initialize(NSA(CONFIG, Policy(jnp.bfloat16)), jax.random.key(0))
    x = jnp.asarray(hidden(2, size), jnp.bfloat16)
    entries = empty_cache(CONFIG, 2, LENGTH, jnp.bfloat16).dense
    positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (2, size))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def extend(attention, x, positions, entries):
        angles = rope.angles(positions, CONFIG)
        return attention.extend(x, angles, LayerCache(entries, jnp.int32(0)), positions)[0]

    out = extend(attention, x, positions, entries)
    assert out.dtype == jnp.bfloat16 and jnp.isfinite(out.astype(jnp.float32)).all()


def test_packed_document_is_what_it_is_alone():
    """Nothing crosses a border, and blocks are counted from the document's own beginning."""
    x = jnp.asarray(hidden(), jnp.float32)
    packed = run(module(), x, jnp.asarray(SEGMENTS)[None])
    for document in (1, 2, 3):
        own = np.flatnonzero(SEGMENTS == document)
        assert_close(packed[:, own], run(module(), x[:, own]), F32, f"document {document}")


@pytest.mark.parametrize("chunk", [16, 10])
def test_decoding_equals_the_whole_sequence(chunk):
    """Two rows at positions of their own: chunks, then single tokens across strides and blocks."""
    x = jnp.asarray(hidden(2), jnp.float32)
    want = run(module(), x)
    entries = empty_cache(CONFIG, 2, LENGTH + chunk, jnp.float32).dense

    @functools.partial(jax.jit, compiler_options=QUICK)
    def extend(x, positions, entries):
        angles = rope.angles(positions, CONFIG)
        out, cache = module().extend(x, angles, LayerCache(entries, jnp.int32(0)), positions)
        return out, cache.entries

    def at(begin, size):
        return begin[:, None] + np.arange(size, dtype=np.int32)[None]

    def rows(places, ends):
        known = x[jnp.arange(2)[:, None], jnp.minimum(places, LENGTH - 1)]
        return jnp.where((places < ends[:, None])[:, :, None], known, 7.0)  # then whatever

    ends = np.array([2 * chunk, 2 * chunk - 7], np.int32)  # the second's last chunk is not full
    for begin in (0, chunk):
        places = at(np.full(2, begin, np.int32), chunk)
        got, entries = extend(rows(places, ends), places, entries)
        for row, end in enumerate(ends):
            own = slice(0, min(chunk, end - begin))
            assert_close(got[row, own], want[row, begin : begin + chunk][own], F32, "chunk")
    for step in range(LENGTH - 2 * chunk):
        places = at(ends + step, 1)
        got, entries = extend(rows(places, ends + LENGTH), places, entries)
        assert_close(got[:, 0], want[np.arange(2), ends + step], F32, f"step {step}")


def test_gradient_is_the_oracles_finite_difference():
    """Every parameter's, along a random direction; the choice of blocks has none."""
    x = hidden(length=40)
    attention, segments = module(), np.ones(40, np.int32)
    weight = np.random.default_rng(1).normal(size=(40, CONFIG.dim))

    def total(attention):
        return (
            attend(attention, jnp.asarray(x, jnp.float32))[0] * jnp.asarray(weight, jnp.float32)
        ).sum()

    gradients = _tree(jax.jit(jax.grad(total), compiler_options=QUICK)(attention))
    params = _tree(attention)
    for path in _paths(params):
        direction = np.random.default_rng(2).normal(size=_at(params, path).shape)
        sides = []
        for step in (1e-6, -1e-6):
            moved = _moved(params, path, step * direction)
            sides.append((oracle(x[0], moved, CONFIG, segments) * weight).sum())
        want = (sides[0] - sides[1]) / 2e-6
        got = (np.asarray(_at(gradients, path), np.float64) * direction).sum()
        assert got == pytest.approx(want, rel=1e-3, abs=1e-3), path


def _paths(tree, path=()):
    if not isinstance(tree, dict):
        return [path]
    return [leaf for name, child in tree.items() for leaf in _paths(child, (*path, name))]


def _at(tree, path):
    return functools.reduce(lambda node, name: node[name], path, tree)


def _moved(tree, path, change):
    if not path:
        return tree + change
    return tree | {path[0]: _moved(tree[path[0]], path[1:], change)}


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2, "context": 2}, {"fsdp": 8}], ids=str)
def test_split_over_devices_it_is_the_same(sizes):
    x = jnp.asarray(hidden(8), jnp.float32)
    segments = jnp.asarray(np.stack([SEGMENTS] * 8))
    parts = sizes.get("context", 1)

    def total(attention, x):
        out = attend(attention, x, segments)
        return (
            out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))
        ).sum(), out

    want = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)(module(), x)

    def split(attention, x):
        positions = rope.positions_in_segments(segments)
        arranged = [context.arrange(a) for a in (positions, segments)]
        angles = rope.angles(arranged[0], CONFIG)
        out = attention(x[:, context.order(LENGTH, parts)], angles, arranged[1])
        out = context.restore(out)
        return (
            out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))
        ).sum(), out

    mesh = make_mesh(sizes)
    placed = jax.tree.map(jax.device_put, module(), shardings(module(), mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(split, has_aux=True), compiler_options=QUICK)(placed, x)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(one, other, F32, "gradient or output")


@pytest.mark.parametrize(
    ("length", "ratio"), [(8192, 4.0), (16384, 6.4), (32768, 9.1), (65536, 11.6)]
)
def test_decode_step_reads_a_twelfth_of_a_64k_cache(length, ratio):
    """Positions whose keys meet the queries, counted in the traced step, as the paper counts them:
    T / 16 + 16 * 64 + 512."""
    config = dataclasses.replace(
        CONFIG, nsa_length=32, nsa_stride=16, nsa_block=64, nsa_count=16, nsa_window=512
    )
    positions = jnp.full((1, 1), length - 1, jnp.int32)
    entries = jax.eval_shape(lambda: empty_cache(config, 1, length, jnp.float32)).dense

    def step(x, entries, positions):
        cache = LayerCache(entries, jnp.int32(0))
        return module(config).extend(x, rope.angles(positions, config), cache, positions)[0]

    x = jax.ShapeDtypeStruct((1, 1, config.dim), jnp.float32)
    traced = jax.make_jaxpr(step)(x, entries, positions)
    keys = sum(_key_positions(traced.jaxpr, config))
    assert keys == length // 16 + 1024 + 512
    assert length / keys == pytest.approx(ratio, abs=0.05)


def _key_positions(jaxpr, config):
    """The positions of every product of queries, [1, 1, P, N / P, H], with keys."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from _key_positions(inner, config)
        if equation.primitive.name == "dot_general":
            shapes = [variable.aval.shape for variable in equation.invars]
            if all(shape[-1] == config.qk_head_dim and len(shape) >= 4 for shape in shapes):
                yield max(map(math.prod, shapes)) // (config.kv_heads * config.qk_head_dim)


def test_cache_holds_three_branches_and_an_entry_per_stride():
    cache = jax.eval_shape(lambda: empty_cache(CONFIG, 2, 64, jnp.bfloat16))
    assert cache.dense is not None and cache.dense["entry_key"].shape == (1, 2, 2, 16, 8)
    assert cache.dense["select_value"].shape == (1, 2, 2, 64, 6)
    bytes_ = sum(leaf.size * 2 for leaf in jax.tree.leaves(cache))
    assert bytes_ == 2 * 64 * flops.cache_bytes_per_token(CONFIG)


def test_matmul_parameters_are_the_projections_and_a_share_of_the_networks():
    matrices, networks = 0, 0
    for declared in declarations(NSA(CONFIG, Policy(jnp.float32))):
        if "compress_" in declared.path and ".w_" in declared.path:
            networks += declared.count
        elif len(declared.shape) == 2 and "position" not in declared.path:
            matrices += declared.count
    assert NSA.matmul_parameters(CONFIG) == matrices + networks * 2 // 4


def test_context_flops_are_those_of_the_keys_that_are_read():
    per_key = 2 * CONFIG.n_heads * (8 + 6)
    seen = [max((t + 1 - 8) // 4 + 1, 0) + min(t + 1, 4 * 8) + min(t + 1, 6) for t in range(4096)]
    wanted = per_key * np.mean(seen)
    assert NSA.context_flops(CONFIG, 4096, causal=True) == pytest.approx(wanted, rel=3e-3)
    full = per_key * (4096 / 4 + 32 + 6)
    assert NSA.context_flops(CONFIG, 4096, causal=False) == full

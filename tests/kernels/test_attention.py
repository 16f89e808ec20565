"""Attention against the whole score matrix, and what causality and isolation mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import attention as module
from dsjax.kernels.attention import full_attention, splash_attention
from dsjax.kernels.target import Target
from tests.closeness import BF16, F32, assert_close
from tests.oracles.kernels import reference_attention

causal_attention = functools.partial(module.causal_attention, target=Target("cpu"))


def _inputs(length, heads=4, key_heads=2, width=16, value_width=8):
    rng = np.random.default_rng(length)
    shapes = [
        (2, length, heads, width),
        (2, length, key_heads, width),
        (2, length, key_heads, value_width),
    ]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def _segments(length):
    return jnp.asarray(np.repeat(np.arange(length) // 170 + 1, 2).reshape(length, 2).T, jnp.int32)


@pytest.mark.parametrize(
    "target", [Target("cpu"), Target("gpu")], ids=str
)  # "gpu" is tokamax's where it is installed
@pytest.mark.parametrize("isolated", [False, True])
def test_attention_equals_reference_in_value_and_gradient(isolated, target):
    q, k, v = _inputs(1100)
    segments = _segments(1100) if isolated else None

    def total(attention, q, k, v):
        out = attention(q, k, v, scale=0.3, segment_ids_BT=segments)
        return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape))).sum(), out

    def run(attention):
        return jax.jit(jax.grad(functools.partial(total, attention), (0, 1, 2), has_aux=True))(
            q, k, v
        )

    for name, got, want in zip(
        ("dq", "dk", "dv", "out"),
        jax.tree.leaves(run(functools.partial(module.causal_attention, target=target))),
        jax.tree.leaves(run(reference_attention)),
        strict=True,
    ):
        assert_close(got, want, F32, name)


@pytest.mark.parametrize("length", [100, 300])  # one chunk of queries, and two
@pytest.mark.parametrize("key_heads", [4, 2])
def test_bfloat16_runs_on_a_cpu(length, key_heads):
    inputs = [x.astype(jnp.bfloat16) for x in _inputs(length, key_heads=key_heads)]

    def total(attention, *inputs):
        out = attention(*inputs, scale=0.3).astype(jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape))).sum()

    def run(attention, *inputs):
        return jax.jit(jax.grad(functools.partial(total, attention), (0, 1, 2)))(*inputs)

    want = run(reference_attention, *(x.astype(jnp.float32) for x in inputs))
    for name, one, other in zip("qkv", run(causal_attention, *inputs), want, strict=True):
        assert one.dtype == jnp.bfloat16
        assert_close(one, other, BF16, f"d{name}")


@pytest.mark.parametrize("dtype, level", [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_attention_to_all_equals_jaxs_in_value_and_gradient(dtype, level):
    inputs = [x.astype(dtype) for x in _inputs(10, key_heads=4, value_width=16)]

    def total(attention, *inputs):
        out = attention(*inputs).astype(jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape))).sum(), out

    def run(attention, *inputs):
        run = jax.grad(functools.partial(total, attention), (0, 1, 2), has_aux=True)
        return jax.tree.leaves(jax.jit(run)(*inputs))

    want = run(jax.nn.dot_product_attention, *(x.astype(jnp.float32) for x in inputs))
    for name, one, other in zip(
        ("dq", "dk", "dv", "out"), run(full_attention, *inputs), want, strict=True
    ):
        assert_close(one, other, level, name)


def test_attention_sees_no_later_token_and_no_other_document():
    length, at = 300, 200
    q, k, v = _inputs(length)
    segments = _segments(length)

    def influence(v):
        return causal_attention(q, k, v, scale=0.3, segment_ids_BT=segments)[:, at].sum()

    reached = np.abs(np.asarray(jax.jit(jax.grad(influence))(v))).sum(axis=(0, 2, 3)) > 0
    want = (np.arange(length) <= at) & (np.asarray(segments[0]) == segments[0, at])
    np.testing.assert_array_equal(reached, want)


def test_query_heads_share_keys_in_consecutive_groups():
    q, k, v = _inputs(64)
    repeated = [jnp.repeat(x, 2, axis=2) for x in (k, v)]
    got = causal_attention(q, k, v, scale=0.3)
    assert_close(got, causal_attention(q, *repeated, scale=0.3), F32, "grouped heads")


@pytest.mark.parametrize("length", [128, 100, 521])
def test_tpu_takes_its_kernel_but_for_short_rows(monkeypatch, length):
    taken = []
    monkeypatch.setattr(module, "splash_attention", lambda *inputs: taken.append(1) or inputs[0])
    module.causal_attention(*_inputs(length), scale=0.3, target=Target("tpu"))
    assert bool(taken) == (length != 100)


def test_tpu_kernel_equals_reference_with_isolated_documents():
    """Without documents, and in its gradient: tests/parallel/test_attention.py."""
    q, k, v = _inputs(256)
    segments = _segments(256)
    got = splash_attention(q, k, v, 0.3, segments, interpret=True)
    assert_close(got, reference_attention(q, k, v, scale=0.3, segment_ids_BT=segments), F32, "out")


@pytest.mark.parametrize("packed", [False, True])
def test_tpu_kernel_fills_rows_that_tiles_do_not_divide(monkeypatch, packed):
    monkeypatch.setattr(module, "_MAX_TILE", 128)
    q, k, v = _inputs(200)
    segments = _segments(200) if packed else None

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(attend, *operands):
        out, backward = jax.vjp(functools.partial(attend, scale=0.3), *operands)
        return out, *backward(jnp.cos(out))

    def filled(q, k, v, scale):
        return splash_attention(q, k, v, scale, segments, interpret=True)

    want = gradients(functools.partial(reference_attention, segment_ids_BT=segments), q, k, v)
    for name, one, other in zip(
        ("out", "dq", "dk", "dv"), gradients(filled, q, k, v), want, strict=True
    ):
        assert_close(one, other, F32, name)

"""Attention to chosen keys over a mesh: each device has rows, queries and heads of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.sparse_attention import Index
from dsjax.kernels.target import Target
from dsjax.parallel import context
from dsjax.parallel.context import arrange, restore
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharded_sparse_attention import expanded, gathered
from tests.closeness import F32, assert_close

B, T, N, C, R, H, HEADS, WIDTH, COUNT = 2, 20, 2, 6, 4, 5, 3, 4, 5
SEGMENTS = np.array([[1] * 10 + [2] * 10, [1] * 20], np.int32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


INDEX = Index(normal(0, B, T, HEADS, WIDTH), normal(1, B, T, HEADS), normal(2, B, T, WIDTH))
LATENT, ROPE_KEY, WEIGHTS = normal(3, B, T, C), normal(4, B, T, R), normal(5, C, N * H)


def expand(latent_BSC, rope_key_BSR, weights):
    k_nope = jnp.einsum("BSC,CX->BSX", latent_BSC, weights).reshape(*latent_BSC.shape[:2], -1, H)
    rope = jnp.broadcast_to(rope_key_BSR[:, :, None], (*k_nope.shape[:3], R))
    return jnp.concatenate([k_nope, rope], axis=-1), k_nope


def of_gathered(lesson, latent, rope_key, weights, index, segments):
    """The weights only make queries here, so that the gradients of both are of the same inputs."""
    q_BTNC = jnp.einsum("BTC,CX->BTX", latent, weights).reshape(B, T, N, H)
    q = jnp.concatenate([q_BTNC, q_BTNC], axis=-1)
    return gathered(
        q, jnp.concatenate([latent, rope_key], axis=-1), index, segments, lesson=lesson, width=C,
        count=COUNT, scale=0.3, target=Target("cpu"),
    )  # fmt: skip


def of_expanded(lesson, latent, rope_key, weights, index, segments):
    q = jnp.einsum("BTC,CX->BTX", latent, weights).reshape(B, T, N, H)
    q = jnp.concatenate([q, q[..., :R]], axis=-1)
    return expanded(
        q, (latent, rope_key), weights, index, segments, lesson=lesson, expand=expand, count=COUNT,
        scale=0.3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("way", "lesson"),
    [
        (of_gathered, "sparse"),
        pytest.param(of_gathered, None, marks=pytest.mark.heavy),
        pytest.param(of_expanded, "sparse", marks=pytest.mark.heavy),
        (of_expanded, "warmup"),
    ],
    ids=["gathered sparse", "gathered", "expanded sparse", "expanded warmup"],
)
def test_all_devices_together_compute_what_one_does(way, lesson, monkeypatch):
    monkeypatch.setattr(context, "_MOST_BLOCK", 3)  # a chunk of 5 is filled up
    inputs = LATENT, ROPE_KEY, WEIGHTS, INDEX

    def total(inputs, order, back):
        segments = order(jnp.asarray(SEGMENTS))
        latent, rope_key, weights, index = inputs
        latent, rope_key, index = jax.tree.map(order, (latent, rope_key, index))
        out, divergence = way(lesson, latent, rope_key, weights, index, segments)
        out = back(out)
        cost = (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)).sum()
        if divergence is None:
            return cost, (out,)
        divergence = back(divergence[..., None])[..., 0]
        return cost + (divergence * jnp.arange(T, dtype=out.dtype)[None]).sum(), (out, divergence)

    run = functools.partial(jax.value_and_grad, has_aux=True)

    def in_order(x):
        return jnp.moveaxis(arrange(jnp.moveaxis(x, (0, 1), (-2, -1))), (-2, -1), (0, 1))

    want = jax.jit(run(lambda inputs: total(inputs, lambda x: x, lambda x: x)))(inputs)
    with jax.set_mesh(make_mesh({"data": 2, "context": 2, "tensor": 2})):
        got = jax.jit(run(lambda inputs: total(inputs, in_order, restore)))(inputs)
    for number, parts in enumerate(zip(*map(jax.tree.leaves, (got, want)), strict=True)):
        assert_close(*parts, F32, f"result {number}")

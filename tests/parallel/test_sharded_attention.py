"""Attention under a mesh: the TPU's kernel is given each device's part, and gives the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import attention as kernels
from dsjax.kernels.target import Target
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharded_attention import sharded_attention
from tests.closeness import F32, assert_close


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's kernel, its steps run on the CPU."""
    splash = functools.partial(kernels.splash_attention, interpret=True)
    monkeypatch.setattr(kernels, "splash_attention", splash)


def test_attention_of_each_device_is_that_of_all(interpreted):
    rng = np.random.default_rng(0)
    shapes = [(4, 128, 4, 24), (4, 128, 2, 24), (4, 128, 2, 16)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(np.repeat(np.arange(4) + 1, 32)[None].repeat(4, 0), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(4, 128, 4, 16)), jnp.float32)

    def total(q, k, v, target):
        out = sharded_attention(q, k, v, segments, scale=0.3, target=target)
        return (out * weights).sum(), out

    gradient = jax.grad(total, (0, 1, 2), has_aux=True)
    want = jax.jit(functools.partial(gradient, target=Target("cpu")))(q, k, v)
    with jax.set_mesh(make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})):
        got = jax.jit(functools.partial(gradient, target=Target("tpu")))(q, k, v)
    names = ("dq", "dk", "dv", "out")
    for name, one, other in zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(one, other, F32, name)


def test_heads_that_do_not_divide_are_refused():
    q = jnp.zeros((4, 128, 4, 24))
    kv = jnp.zeros((4, 128, 1, 24))
    with (
        jax.set_mesh(make_mesh({"data": 4, "tensor": 2})),
        pytest.raises(ValueError, match=r"attention: dimension heads=1 .* mesh.tensor=2"),
    ):
        sharded_attention(q, kv, kv, None, scale=0.3, target=Target("tpu"))

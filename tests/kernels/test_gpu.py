"""What a GPU is given when tokamax is installed, by a stand-in with tokamax's signatures; on a
Hopper GPU its own kernel of attention.
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import attention, grouped_matmul
from dsjax.kernels.gpu import is_hopper, tokamax
from dsjax.kernels.varying import shipped_promotion
from tests.closeness import BF16, F32, assert_close


@pytest.fixture
def asked(monkeypatch):
    """Installs the stand-in; what its kernels were asked for."""
    names = []

    def named(name, function):
        def call(*arguments, **options):
            names.append(name)
            return function(*arguments, **options)

        return call

    module = types.ModuleType("tokamax")
    module.ragged_dot_general = named("ragged", jax.lax.ragged_dot_general)
    module.dot_product_attention = named("attention", jax.nn.dot_product_attention)
    monkeypatch.setitem(sys.modules, "tokamax", module)
    tokamax.cache_clear()
    yield names
    tokamax.cache_clear()


def test_missing_module_is_none_but_a_broken_one_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    tokamax.cache_clear()
    assert tokamax() is None
    tokamax.cache_clear()

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "tokamax":
                raise ModuleNotFoundError("No module named 'xprof'", name="xprof")

    monkeypatch.delitem(sys.modules, "tokamax")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="xprof"):
        tokamax()
    tokamax.cache_clear()


def test_grouped_products_are_tokamax_s_on_a_gpu(asked):
    rng = np.random.default_rng(0)
    x, w, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((50, 8), (3, 8, 6), (50, 6)))
    sizes = jnp.asarray([20, 0, 30], jnp.int32)
    got = grouped_matmul.grouped_matmul(x, w, sizes, "gpu")
    back = grouped_matmul.grouped_matmul(y, w, sizes, "gpu", transpose_w=True)
    outer = grouped_matmul.grouped_outer(x, y, sizes, "gpu")
    assert asked == ["ragged"] * 3
    assert_close(got, grouped_matmul.reference_matmul(x, w, sizes), F32, "product")
    want = grouped_matmul.reference_matmul(y, w.swapaxes(1, 2), sizes)
    assert_close(back, want, F32, "transposed")
    assert_close(outer, grouped_matmul.reference_outer(x, y, sizes), F32, "outer")
    grouped_matmul.grouped_matmul(x, w, sizes, "cpu")
    assert asked == ["ragged"] * 3


@pytest.mark.parametrize("isolated", [False, True])
def test_attention_is_tokamax_s_on_a_gpu(asked, isolated):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 70, n, 8)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.arange(140).reshape(2, 70) // 33, jnp.int32) if isolated else None
    got = attention.causal_attention(q, k, v, scale=0.3, platform="gpu", segment_ids_BT=segments)
    assert asked == ["attention"]
    want = attention.reference_attention(q, k, v, scale=0.3, segment_ids_BT=segments)
    assert_close(got, want, F32, "out")


@pytest.mark.gpu
def test_cudnn_attention_equals_reference_with_heads_as_mla_s():
    if not is_hopper():
        pytest.skip("needs a Hopper GPU")
    rng = np.random.default_rng(0)
    shapes = (2, 1000, 4, 192), (2, 1000, 2, 192), (2, 1000, 2, 128), (2, 1000, 4, 128)
    q, k, v, dout = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    def run(attention, *operands):
        out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, scale=0.1), *operands)
        return out, *backward(dout.astype(out.dtype))

    with shipped_promotion():
        got = jax.jit(lambda *x: run(attention.cudnn_attention, *x))(q, k, v)
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        want = jax.jit(lambda *x: run(attention.reference_attention, *x))(*wide)
    for name, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert_close(g.astype(jnp.float32), w, BF16, name)

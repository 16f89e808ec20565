"""Targets read from devices, and the kernels chosen for them: a described Hopper's, and tokamax's
by a stand-in with its signatures.
"""

import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import attention, grouped_matmul
from dsjax.kernels.target import HOPPER, Target, tokamax
from tests.closeness import F32, assert_close
from tests.oracles.kernels import reference_attention, reference_matmul, reference_outer


def _gpu(capability):
    return SimpleNamespace(
        platform="gpu", device_kind="a GPU", compute_capability=capability, core_count=114
    )


def _tpu(kind):
    return SimpleNamespace(platform="tpu", device_kind=kind)


@pytest.mark.parametrize(
    ("device", "capability", "multiplies_e4m3"),
    [
        (_gpu("8.0"), (8, 0), False),
        (_gpu("8.9"), (8, 9), True),
        (_gpu("9.0"), (9, 0), True),
        (_gpu("10.0"), (10, 0), True),
        (_gpu("gfx942"), (), False),
        (_tpu("TPU v4"), (4,), False),
        (_tpu("TPU v5 lite"), (5,), False),
        (_tpu("TPU v6 lite"), (6,), False),
        (_tpu("TPU7x"), (7,), True),
        (SimpleNamespace(platform="cpu", device_kind="cpu"), (), False),
    ],
    ids=lambda value: getattr(value, "compute_capability", getattr(value, "device_kind", "")),
)
def test_target_is_read_from_a_device(device, capability, multiplies_e4m3):
    target = Target.of(device)
    assert (target.kind, target.capability) == (device.platform, capability)
    assert target.multiplies_e4m3 == multiplies_e4m3
    assert target.is_hopper == (capability == (9, 0))


def test_number_of_multiprocessors_is_the_device_s_own():
    assert Target.of(_gpu("9.0")) == Target("gpu", (9, 0), 114) != HOPPER


def test_machine_without_kernels_is_refused():
    with pytest.raises(ValueError, match="no kernels for platform 'METAL'; use one of cpu, gpu, "):
        Target("METAL")


@pytest.mark.parametrize("target", [HOPPER, Target("gpu", (8, 0))], ids=["hopper", "ampere"])
def test_experts_of_an_absent_gpu_are_lowered_for_its_own_kernels(target):
    shapes = (512, 128), (4, 128, 64), (512, 64)
    x, w, y = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def products(x, w, y, sizes):
        return (
            grouped_matmul.grouped_matmul(x, w, sizes, target),
            grouped_matmul.grouped_outer(x, y, sizes, target),
        )

    traced = jax.jit(products).trace(x, w, y, sizes)
    kernels = traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu")
    assert (kernels > 1) == target.is_hopper


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
    got = grouped_matmul.grouped_matmul(x, w, sizes, Target("gpu"))
    back = grouped_matmul.grouped_matmul(y, w, sizes, Target("gpu"), transpose_w=True)
    outer = grouped_matmul.grouped_outer(x, y, sizes, Target("gpu"))
    assert asked == ["ragged"] * 3
    assert_close(got, reference_matmul(x, w, sizes), F32, "product")
    want = reference_matmul(y, w.swapaxes(1, 2), sizes)
    assert_close(back, want, F32, "transposed")
    assert_close(outer, reference_outer(x, y, sizes), F32, "outer")
    grouped_matmul.grouped_matmul(x, w, sizes, Target("cpu"))
    assert asked == ["ragged"] * 3


@pytest.mark.parametrize("isolated", [False, True])
def test_attention_is_tokamax_s_on_a_gpu(asked, isolated):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 70, n, 8)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.arange(140).reshape(2, 70) // 33, jnp.int32) if isolated else None
    got = attention.causal_attention(
        q, k, v, scale=0.3, target=Target("gpu"), segment_ids_BT=segments
    )
    assert asked == ["attention"]
    want = reference_attention(q, k, v, scale=0.3, segment_ids_BT=segments)
    assert_close(got, want, F32, "out")

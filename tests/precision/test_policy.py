from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dsjax.precision.policy import Policy, multiplies_e4m3


def test_policy_is_for_the_platform_at_hand_unless_named():
    assert Policy().platform == jax.default_backend()
    assert Policy(platform="tpu").platform == "tpu"


def test_equal_policies_are_one_static_value_to_jit():
    assert hash(Policy(jnp.float32)) == hash(Policy(jnp.float32))
    assert Policy(jnp.float32) != Policy(jnp.bfloat16)


def _gpu(capability):
    return SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability=capability)


def _tpu(kind):
    return SimpleNamespace(platform="tpu", device_kind=kind)


@pytest.mark.parametrize(
    ("device", "can"),
    [
        (_gpu("8.0"), False),
        (_gpu("8.9"), True),
        (_gpu("9.0"), True),
        (_gpu("10.0"), True),
        (_gpu("gfx942"), False),
        (_tpu("TPU v5"), False),
        (_tpu("TPU v6 lite"), False),
        (_tpu("TPU7x"), True),
        (SimpleNamespace(platform="cpu", device_kind="cpu"), False),
    ],
    ids=lambda value: getattr(value, "compute_capability", getattr(value, "device_kind", None)),
)
def test_e4m3_units_are_known_by_the_device(device, can):
    assert multiplies_e4m3(device) == can


def test_native_fp8_is_chosen_by_the_device_of_that_platform(monkeypatch):
    assert Policy(fp8="pow2").native_fp8 is False
    monkeypatch.setattr(jax, "devices", lambda: [_gpu("9.0")])
    assert Policy(platform="gpu", fp8="pow2").native_fp8 is True
    assert Policy(platform="tpu", fp8="pow2").native_fp8 is False
    assert Policy(platform="gpu", fp8="pow2", native_fp8=False).native_fp8 is False


def test_platform_without_a_path_is_refused():
    with pytest.raises(ValueError, match="'METAL' has no kernels here, and no way to multiply in"):
        Policy(platform="METAL", fp8="pow2")
    with pytest.raises(ValueError, match="fp8='e5m2' is not a kind of scale; use 'fp32' or 'pow2'"):
        Policy(fp8="e5m2")  # pyright: ignore

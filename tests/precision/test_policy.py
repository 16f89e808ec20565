import jax.numpy as jnp
import pytest

from dsjax.kernels.target import HOPPER, Target
from dsjax.precision.policy import Policy


def test_policy_is_for_the_machine_at_hand_unless_named():
    assert Policy().target == Target.here()
    assert Policy(target=HOPPER).target == HOPPER


def test_equal_policies_are_one_static_value_to_jit():
    assert hash(Policy(jnp.float32)) == hash(Policy(jnp.float32))
    assert Policy(jnp.float32) != Policy(jnp.bfloat16)


def test_native_fp8_is_chosen_by_the_target():
    assert Policy(target=Target("cpu"), fp8="pow2").native_fp8 is False
    assert Policy(target=HOPPER, fp8="pow2").native_fp8 is True
    assert Policy(target=HOPPER).native_fp8 is False
    assert Policy(target=HOPPER, fp8="pow2", native_fp8=False).native_fp8 is False


def test_unknown_kind_of_scale_is_refused():
    with pytest.raises(ValueError, match="fp8='e5m2' is not a kind of scale; use 'fp32' or 'pow2'"):
        Policy(fp8="e5m2")  # pyright: ignore

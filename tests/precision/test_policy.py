import jax.numpy as jnp
import pytest

from dsjax.kernels.target import HOPPER, Target
from dsjax.precision import policy
from dsjax.precision.policy import Policy, advice


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


@pytest.mark.parametrize(
    ("compute", "target", "tokamax", "said"),
    [
        ("bfloat16", Target("cpu"), None, "set precision.compute=float32"),
        ("float32", Target("cpu"), None, None),
        ("bfloat16", HOPPER, None, None),
        ("float32", HOPPER, None, "on an H100 or H200 set precision.compute=bfloat16"),
        ("bfloat16", Target("gpu", (8, 0)), None, "on other GPUs, with Python 3.12: pip install"),
        ("float32", Target("gpu", (8, 0)), object(), None),
        ("bfloat16", Target("tpu", (5,)), None, None),
        ("float32", Target("tpu", (5,)), None, None),
    ],
)
def test_advice_is_given_where_a_machine_would_be_slow(compute, target, tokamax, said, monkeypatch):
    monkeypatch.setattr(policy, "tokamax", lambda: tokamax)
    given = advice(compute, target)
    assert given is None if said is None else said in (given or "")

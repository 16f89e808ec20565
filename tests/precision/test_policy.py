import jax
import jax.numpy as jnp

from dsjax.precision.policy import Policy


def test_policy_is_for_the_platform_at_hand_unless_named():
    assert Policy().platform == jax.default_backend()
    assert Policy(platform="tpu").platform == "tpu"


def test_equal_policies_are_one_static_value_to_jit():
    assert hash(Policy(jnp.float32)) == hash(Policy(jnp.float32))
    assert Policy(jnp.float32) != Policy(jnp.bfloat16)

"""One very small model with every V3 mechanism on, for the tests that need any model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.kernels.target import Target
from dsjax.model.layers import Constant
from dsjax.model.transformer import Transformer
from dsjax.precision.fp8 import Scale
from dsjax.precision.policy import Policy

TINY = ModelConfig(
    vocab_size=96,
    dim=32,
    n_layers=3,
    n_dense_layers=1,
    n_heads=4,
    inter_dim=48,
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=8,
    n_shared_experts=1,
    n_activated_experts=2,
    moe_inter_dim=16,
    n_expert_groups=4,
    n_limited_groups=2,
    router_bias=True,
    norm_topk=True,
    route_scale=2.5,
    n_mtp=2,
    init_std=0.1,
)


@functools.cache
def tiny_model(
    config: ModelConfig = TINY,
    seed: int = 0,
    compute=jnp.float32,
    target: Target | None = None,
    fp8: Scale | None = None,
) -> Transformer:
    """A model with values from NumPy, which need no compilation; norms are away from 1, biases from
    0.
    """
    return _fill(Transformer(config, Policy(compute, target or Target.here(), fp8)), seed)


def filled(kind: type[nnx.Module], config: ModelConfig = TINY, compute=jnp.float32, seed: int = 0):
    """A module of one layer with such values."""
    return _fill(kind(config, Policy(compute)), seed)  # type: ignore


def _fill(declared, seed: int):
    rng = np.random.default_rng(seed)

    def fill(variable: nnx.Variable) -> nnx.Variable:
        shape, init = variable.get_value().shape, variable.get_metadata()["init"]
        if isinstance(init, Constant):
            return variable.copy(
                jnp.asarray(init.value + rng.uniform(-0.5, 0.5, shape), jnp.float32)
            )
        return variable.copy(jnp.asarray(rng.normal(0.0, init.std, shape), jnp.float32))

    return jax.tree.map(fill, declared, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, length)), jnp.int32
    )

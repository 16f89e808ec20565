"""A very small DeepSeek-V4, all of whose values are drawn, for the tests that need one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.model.layers import Normal
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy

COMPRESSED = ModelConfig(
    vocab_size=64,
    dim=16,
    n_layers=4,
    n_heads=4,
    inter_dim=8,
    max_seq_len=128,
    attention="compressed",
    layer_types=("window", "sparse", "heavy", "sparse"),
    hash_layers=(0,),
    n_kv_heads=1,
    head_dim=8,
    qk_rope_head_dim=4,
    q_lora_rank=8,
    o_groups=2,
    o_lora_rank=8,
    window_size=5,
    sparse_ratio=4,
    heavy_ratio=8,
    index_n_heads=16,
    index_head_dim=8,
    index_topk=3,
    hc_mult=2,
    hc_sinkhorn_iters=4,
    n_routed_experts=4,
    n_shared_experts=1,
    n_activated_experts=2,
    moe_inter_dim=8,
    score_func="sqrtsoftplus",
    router_bias=True,
    norm_topk=True,
    route_scale=1.5,
    swiglu_limit=2.0,
    init_std=0.3,
)


@functools.cache
def compressed_model(config: ModelConfig = COMPRESSED, seed: int = 0) -> Transformer:
    return drawn(Transformer(config, Policy(jnp.float32)), seed)


def drawn(module, seed: int = 0):
    """A declared module with values from NumPy, which need no compilation: nothing is 0 or 1, and
    tables are as declared.
    """
    rng = np.random.default_rng(seed)

    def fill(variable: nnx.Variable) -> nnx.Variable:
        shape, init = variable.get_value().shape, variable.get_metadata()["init"]
        if isinstance(init, Normal):
            return variable.copy(jnp.asarray(rng.normal(0.0, init.std, shape), jnp.float32))
        if hasattr(init, "value"):
            moved = init.value + rng.uniform(-0.5, 0.5, shape)
            return variable.copy(jnp.asarray(moved, jnp.float32))
        return variable.copy(init(jax.random.key(0), shape, jnp.float32))

    return jax.tree.map(fill, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(0, COMPRESSED.vocab_size, (batch, length))
    return ids.astype(np.int32)

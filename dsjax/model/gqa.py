"""Grouped-query attention, multi-head included: dense family, distills and DeepSeekMoE.

Paper: DeepSeek LLM (arXiv:2401.02954) section 2.2; shapes of Llama, Qwen2 and Qwen3.
"""

from __future__ import annotations

import jax

from dsjax.config import ModelConfig
from dsjax.kernels.cached_attention import Attended, Block, cached_attention
from dsjax.model import rope
from dsjax.model.attention import Angles, Attention
from dsjax.model.layer_cache import EntryShape, LayerCache
from dsjax.model.layers import Constant, Normal, RMSNorm, declare
from dsjax.parallel import split_cache
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy


class GQA(Attention):
    """Each of P key heads serves N / P consecutive query heads. Caches rotated keys, and values."""

    def __init__(self, config: ModelConfig, policy: Policy):
        init = Normal(config.init_std)
        D, query_width = config.dim, config.n_heads * config.qk_head_dim
        kv_width = config.kv_heads * config.qk_head_dim
        self.wq = declare((D, query_width), ("embed", "heads"), init)
        self.wk = declare((D, kv_width), ("embed", "heads"), init)
        self.wv = declare((D, kv_width), ("embed", "heads"), init)
        self.wo = declare((query_width, D), ("heads", "embed"), init)
        if config.qkv_bias:
            self.bq = declare((query_width,), ("heads",), Constant(0.0))
            self.bk = declare((kv_width,), ("heads",), Constant(0.0))
            self.bv = declare((kv_width,), ("heads",), Constant(0.0))
        if config.qk_norm:
            self.q_norm = RMSNorm(config.qk_head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.qk_head_dim, config.norm_eps)
        self.config = config
        self.policy = policy

    @staticmethod
    def cached(config: ModelConfig) -> dict[str, EntryShape]:
        shape = EntryShape(config.kv_heads, config.qk_head_dim)
        return {"key": shape, "value": shape}

    @staticmethod
    def matmul_parameters(config: ModelConfig) -> int:
        return 2 * config.dim * (config.n_heads + config.kv_heads) * config.qk_head_dim

    def _project(self, x_BTD: jax.Array, name: str) -> jax.Array:
        """Projects to queries, keys or values (name q, k or v): [B, T, heads, H]."""
        out = linear(x_BTD, getattr(self, f"w{name}")[...], self.policy)
        if self.config.qkv_bias:
            out = out + getattr(self, f"b{name}")[...].astype(out.dtype)[None, None]
        return out.reshape(*x_BTD.shape[:2], -1, self.config.qk_head_dim)

    def queries(self, x_BTD: jax.Array, angles: Angles) -> jax.Array:
        q_BTNH = self._project(x_BTD, "q")
        if self.config.qk_norm:
            q_BTNH = self.q_norm(q_BTNH)
        return rope.rotate_halves(q_BTNH, *angles)

    def entries(self, x_BTD: jax.Array, angles: Angles) -> dict[str, jax.Array]:
        k_BTPH = self._project(x_BTD, "k")
        if self.config.qk_norm:
            k_BTPH = self.k_norm(k_BTPH)
        return {"key": rope.rotate_halves(k_BTPH, *angles), "value": self._project(x_BTD, "v")}

    def expand(self, k_BSPH, v_BSPH, weights: None) -> tuple[jax.Array, jax.Array]:  # type: ignore
        return k_BSPH, v_BSPH

    def attend(
        self, cache: LayerCache, q_BTNH: jax.Array, positions_BT: jax.Array, weights: None
    ) -> Attended:
        def block(start: jax.Array | int, size: int) -> Block:
            entries = cache.read(start, size)
            return Block((entries["key"],), entries["value"])

        return cached_attention(
            (q_BTNH,),
            block,
            cache.length,
            positions_BT,
            scale=rope.attention_scale(self.config),
            target=self.policy.target,
            part=split_cache.part(),
        )

"""Grouped-query attention, multi-head included: dense family, distills and DeepSeekMoE.

Paper: DeepSeek LLM (arXiv:2401.02954) section 2.2; shapes of Llama and Qwen2.
"""

from __future__ import annotations

import jax
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.kernels import cached_attention
from dsjax.model import rope
from dsjax.model.layer_cache import EntryShape, LayerCache
from dsjax.model.layers import Constant, Normal, declare
from dsjax.parallel import context
from dsjax.precision.activations import attention_linear
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy


class GQA(nnx.Module):
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
        self.config = config
        self.policy = policy

    @staticmethod
    def cached(config: ModelConfig) -> dict[str, EntryShape]:
        shape = EntryShape(config.kv_heads, config.qk_head_dim)
        return {"key": shape, "value": shape}

    @staticmethod
    def matmul_parameters(config: ModelConfig) -> int:
        return 2 * config.dim * (config.n_heads + config.kv_heads) * config.qk_head_dim

    @staticmethod
    def context_flops(config: ModelConfig, length: int, causal: bool) -> int:
        square = 4 * length * config.n_heads * config.qk_head_dim
        return square // 2 if causal else square

    @staticmethod
    def latent_values(config: ModelConfig) -> int:
        return 0

    def _project(self, x_BTD: jax.Array, name: str) -> jax.Array:
        """[B, T, heads, H] of queries, keys or values (name q, k or v)."""
        out = linear(x_BTD, getattr(self, f"w{name}")[...], self.policy)
        if self.config.qkv_bias:
            out = out + getattr(self, f"b{name}")[...].astype(out.dtype)[None, None]
        return out.reshape(*x_BTD.shape[:2], -1, self.config.qk_head_dim)

    def queries(self, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
        return rope.rotate_halves(self._project(x_BTD, "q"), *angles)

    def keys_values(
        self, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """What decoding caches: rotated keys and values, [B, T, P, H] each."""
        return rope.rotate_halves(self._project(x_BTD, "k"), *angles), self._project(x_BTD, "v")

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        out_BTNH = context.attend(
            self.queries(x_BTD, angles),
            self.keys_values(x_BTD, angles),
            None,
            lambda k_BSPH, v_BSPH, _: (k_BSPH, v_BSPH),
            scale=rope.attention_scale(self.config),
            segment_ids_BT=segment_ids_BT,
            target=self.policy.target,
        )
        out_BTX = out_BTNH.reshape(*x_BTD.shape[:2], -1)
        return attention_linear(out_BTX, self.wo[...], self.policy)

    def extend(
        self,
        x_BTD: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache,
        positions_BT: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """Adds tokens at consecutive positions to the cache and attends from them to it."""
        key_BTPH, value_BTPH = self.keys_values(x_BTD, angles)
        cache = cache.append(positions_BT[:, 0], key=key_BTPH, value=value_BTPH)

        def block(start: jax.Array | int, size: int) -> cached_attention.Block:
            entries = cache.read(start, size)
            return cached_attention.Block((entries["key"],), entries["value"])

        out_BTNH = cached_attention.cached_attention(
            (self.queries(x_BTD, angles),),
            block,
            cache.length,
            positions_BT,
            scale=rope.attention_scale(self.config),
        )
        return linear(out_BTNH.reshape(*x_BTD.shape[:2], -1), self.wo[...], self.policy), cache

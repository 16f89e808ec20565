"""The lightning indexer of DeepSeek-V3.2, which scores earlier tokens for each query of a layer.

Its queries come from MLA's query latent, its keys and the weights of its heads from the layer's
input. All heads share one key per token, which decoding caches beside MLA's latent.

Rope turns the first channels of a head, channel i with i + R/2. MLA turns pairs of adjacent
channels, and the last ones. DeepSeek's first demo turned adjacent pairs here too, which its authors
corrected on 2025-11-17.

Departure: the released kernels rotate queries and keys by a Hadamard matrix, which changes no
score, and round them to E4M3. Here they have the compute type. The heads' weights are float32.

Papers: V3.2-Exp and V3.2 (arXiv:2512.02556), section 2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.model import rope
from dsjax.model.attention import Angles
from dsjax.model.layers import Float32, LayerNorm, Normal, declare
from dsjax.precision.matmul import float32_matmul, linear
from dsjax.precision.policy import Policy


class Indexer(nnx.Module):
    def __init__(self, config: ModelConfig, policy: Policy):
        init = Normal(config.init_std)
        heads, width = config.index_n_heads, config.index_head_dim
        self.wq_b = declare((config.q_lora_rank, heads * width), ("latent", "index_heads"), init)
        self.wk = declare((config.dim, width), ("embed", "latent"), init)
        self.k_norm = LayerNorm(width)
        self.weights_proj = declare((config.dim, heads), ("router_embed", "norm"), init, Float32)
        self.config = config
        self.policy = policy

    @staticmethod
    def matmul_parameters(config: ModelConfig) -> int:
        """Counts the weights of one layer that multiply a token."""
        queries = config.q_lora_rank * config.index_n_heads * config.index_head_dim
        return queries + config.dim * (config.index_head_dim + config.index_n_heads)

    @staticmethod
    def score_flops(config: ModelConfig) -> int:
        """Counts the operations of scoring one key for one query."""
        return 2 * config.index_n_heads * (config.index_head_dim + 1)

    def queries(self, latent_BTQ: jax.Array, angles: Angles) -> jax.Array:
        """Returns rotated queries [B, T, I, Y], given MLA's query latent."""
        q = linear(latent_BTQ, self.wq_b[...], self.policy)
        return self._rotate(q.reshape(*q.shape[:2], self.config.index_n_heads, -1), angles)

    def keys(self, x_BTD: jax.Array, angles: Angles) -> jax.Array:
        """Returns rotated keys [B, T, Y]."""
        k_BTY = self.k_norm(linear(x_BTD, self.wk[...], self.policy))
        return self._rotate(k_BTY[:, :, None], angles)[:, :, 0]

    def weights(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the factor of each head, float32 [B, T, I]; either sign."""
        scale = (self.config.index_n_heads * self.config.index_head_dim) ** -0.5
        return float32_matmul(x_BTD, self.weights_proj[...]) * scale

    def _rotate(self, x_BTIY: jax.Array, angles: Angles) -> jax.Array:
        turned, plain = jnp.split(x_BTIY, [self.config.qk_rope_head_dim], axis=-1)
        return jnp.concatenate([rope.rotate_halves(turned, *angles), plain], axis=-1)

"""Multi-head latent attention (MLA).

Keys and values are projected up, per head, from one normed latent a token; one rotated key is
shared by all heads. Decoding then keeps only the latent and that key. Queries come from a latent of
their own, or straight from the hidden state (V2-Lite).

Paper: DeepSeek-V2 (arXiv:2405.04434) section 2.1, equations 9 to 19; V3 (arXiv:2412.19437) section
2.1.1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsjax.config import ModelConfig
from dsjax.kernels.attention import causal_attention
from dsjax.model import rope
from dsjax.model.layers import Normal, RMSNorm, declare
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy

# DeepSeek's code and transformers give the latents' norms this epsilon, whatever `norm_eps` says.
LATENT_NORM_EPS = 1e-6


def expand_keys_values(
    latent_BSNX: jax.Array, k_rope_BS1R: jax.Array, nope_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Splits the up-projected latent into values and keys, and appends the shared rotated key to
    every head's.

    Args:
      latent_BSNX: [B, S, N, nope_dim + W].

    Returns:
      keys [B, S, N, nope_dim + R] and values [B, S, N, W].
    """
    k_nope, v_BSNW = latent_BSNX[..., :nope_dim], latent_BSNX[..., nope_dim:]
    k_rope = jnp.broadcast_to(k_rope_BS1R, (*k_nope.shape[:3], k_rope_BS1R.shape[-1]))
    return jnp.concatenate([k_nope, k_rope], axis=-1), v_BSNW


class MLA(nnx.Module):
    def __init__(self, config: ModelConfig, policy: Policy):
        init = Normal(config.init_std)
        D, N, C = config.dim, config.n_heads, config.kv_lora_rank
        query_width = N * config.qk_head_dim
        if config.q_lora_rank:
            self.wq_a = declare((D, config.q_lora_rank), ("embed", "latent"), init)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.wq_b = declare((config.q_lora_rank, query_width), ("latent", "heads"), init)
        else:
            self.wq = declare((D, query_width), ("embed", "heads"), init)
        self.wkv_a = declare((D, C + config.qk_rope_head_dim), ("embed", "latent"), init)
        self.kv_norm = RMSNorm(C, LATENT_NORM_EPS)
        kv_width = N * (config.qk_nope_head_dim + config.v_head_dim)
        self.wkv_b = declare((C, kv_width), ("latent", "heads"), init)
        self.wo = declare((N * config.v_head_dim, D), ("heads", "embed"), init)
        self.config = config
        self.policy = policy

    def queries(self, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
        """[B, T, N, H + R], the last R channels rotated."""
        config = self.config
        if config.q_lora_rank:
            latent = checkpoint_name(linear(x_BTD, self.wq_a[...], self.policy), "latent")
            q = linear(self.q_norm(latent), self.wq_b[...], self.policy)
        else:
            q = linear(x_BTD, self.wq[...], self.policy)
        q = q.reshape(*x_BTD.shape[:2], config.n_heads, config.qk_head_dim)
        q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        return jnp.concatenate([q_nope, rope.rotate_pairs(q_rope, *angles)], axis=-1)

    def latents(
        self, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """What decoding caches: normed latent [B, T, C] and rotated shared key [B, T, R]."""
        kv = checkpoint_name(linear(x_BTD, self.wkv_a[...], self.policy), "latent")
        c_BTC, k_rope_BTR = jnp.split(kv, [self.config.kv_lora_rank], axis=-1)
        k_rope_BTR = rope.rotate_pairs(k_rope_BTR[:, :, None], *angles)[:, :, 0]
        return self.kv_norm(c_BTC), k_rope_BTR

    def __call__(
        self,
        x_BTD: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        config = self.config
        q_BTNH = self.queries(x_BTD, angles)
        c_BTC, k_rope_BTR = self.latents(x_BTD, angles)
        expanded = linear(c_BTC, self.wkv_b[...], self.policy).reshape(
            *x_BTD.shape[:2], config.n_heads, -1
        )
        k_BTNH, v_BTNW = expand_keys_values(
            expanded, k_rope_BTR[:, :, None], config.qk_nope_head_dim
        )
        out_BTNW = causal_attention(
            q_BTNH,
            k_BTNH,
            v_BTNW,
            scale=rope.attention_scale(config),
            segment_ids_BT=segment_ids_BT,
        )
        out_BTX = checkpoint_name(out_BTNW.reshape(*x_BTD.shape[:2], -1), "attention")
        return linear(out_BTX, self.wo[...], self.policy)

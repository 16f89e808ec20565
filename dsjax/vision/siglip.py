"""SigLIP's tower (arXiv:2303.15343), as DeepSeek-VL, VL2 and Janus have it: without pooling, and in
all but VL2 with the exact GELU.

A patch is P x P pixels. The convolution that embeds patches does not overlap, so it is a product of
each patch's numbers with a matrix.
"""

from __future__ import annotations

import jax
from flax import nnx

from dsjax.config.vision import SiglipConfig
from dsjax.kernels.attention import full_attention
from dsjax.model.layers import Constant, LayerNorm, Normal, declare, stack
from dsjax.parallel.sharding import constrain
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy
from dsjax.vision.projector import STD, Linear, gelu


class Attention(nnx.Module):
    """Multi-head attention of all patches to all."""

    def __init__(self, config: SiglipConfig, policy: Policy):
        D = config.dim
        # queries, keys, values
        self.wqkv = declare((3, D, D), ("latent", "embed", "heads"), Normal(STD))
        self.bqkv = declare((3, D), ("latent", "heads"), Constant(0.0))
        self.proj = Linear(("heads", "embed"), (D, D), policy)
        self.n_heads, self.policy = config.n_heads, policy

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape

        def project(weight_DD: jax.Array, bias_D: jax.Array) -> jax.Array:
            y_BTD = linear(x_BTD, weight_DD, self.policy)
            y_BTD = y_BTD + bias_D.astype(y_BTD.dtype)[None, None]
            return y_BTD.reshape(B, T, self.n_heads, -1)

        q_BTNH, k_BTNH, v_BTNH = map(project, self.wqkv[...], self.bqkv[...])
        y_BTNH = full_attention(q_BTNH, k_BTNH, v_BTNH)
        return self.proj(y_BTNH.reshape(B, T, D))


class Layer(nnx.Module):
    """A pre-norm layer with biases everywhere."""

    def __init__(self, config: SiglipConfig, policy: Policy):
        D, F = config.dim, config.inter_dim
        self.norm1 = LayerNorm(D, config.norm_eps)
        self.attn = Attention(config, policy)
        self.norm2 = LayerNorm(D, config.norm_eps)
        self.fc1 = Linear(("embed", "ffn"), (D, F), policy)
        self.fc2 = Linear(("ffn", "embed"), (F, D), policy)
        self.exact = config.activation == "gelu"

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = constrain(x_BTD, "batch", "tokens", "width")
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return x_BTD + self.fc2(gelu(self.fc1(self.norm2(x_BTD)), exact=self.exact))


class Pool(nnx.Module):
    """The pooling head of the published towers. Nothing reads it; it is kept to be written."""

    def __init__(self, config: SiglipConfig, policy: Policy):
        D, F = config.dim, config.inter_dim
        self.latent = declare((D,), ("norm",), Normal(STD))
        self.q = Linear(("embed", "heads"), (D, D), policy)
        self.kv = Linear(("embed", "heads"), (D, 2 * D), policy)
        self.proj = Linear(("heads", "embed"), (D, D), policy)
        self.norm = LayerNorm(D, config.norm_eps)
        self.fc1 = Linear(("embed", "ffn"), (D, F), policy)
        self.fc2 = Linear(("ffn", "embed"), (F, D), policy)


class Siglip(nnx.Module):
    """The tower."""

    def __init__(self, config: SiglipConfig, policy: Policy):
        D, P = config.dim, config.patch_size
        # [rows, columns, channels, width], as convolutions are
        self.patch = declare((P, P, 3, D), ("latent", "latent", "latent", "embed"), Normal(STD))
        self.patch_bias = declare((D,), ("norm",), Constant(0.0))
        self.positions = declare((config.n_tokens, D), ("latent", "embed"), Normal(STD))
        self.layers = stack(Layer(config, policy), config.n_layers)
        self.norm = LayerNorm(D, config.norm_eps)
        if config.pool:
            self.pool = Pool(config, policy)
        self.config, self.policy = config, policy

    @jax.named_scope("siglip")
    def __call__(self, pixels_BYXC: jax.Array) -> jax.Array:
        """Looks at pictures, float32 [B, size, size, 3] (`pictures.pixels`).

        Returns:
          features [B, patches, D] in the compute type, row by row.
        """
        P, grid, B = self.config.patch_size, self.config.grid, pixels_BYXC.shape[0]
        seen = pixels_BYXC[:, : grid * P, : grid * P].reshape(B, grid, P, grid, P, 3)
        patches_BTX = seen.swapaxes(2, 3).reshape(B, grid * grid, P * P * 3)
        weight = self.patch[...].reshape(P * P * 3, self.config.dim)
        x_BTD = linear(patches_BTX.astype(self.policy.compute), weight, self.policy)
        added_TD = self.patch_bias[...][None] + self.positions[...]
        x_BTD = x_BTD + added_TD.astype(x_BTD.dtype)[None]
        # In training the backward pass computes a layer again: scores of all patches with all, of
        # every layer and of twenty tiles at once, would be more than a device holds.
        body = jax.checkpoint(lambda x, layer: (layer(x), None), prevent_cse=False)
        x_BTD, _ = jax.lax.scan(body, x_BTD, self.layers)
        return self.norm(x_BTD)

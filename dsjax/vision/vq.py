"""The VQ tokenizer of Janus: pictures to codes and back (LlamaGen, arXiv:2406.06525, section 3.1).

Arrays are [batch, rows, columns, channels]; pixels run from -1 to 1. Sources: Janus' own code. Both
sides of the comparison with the codebook are normalised, so that the nearest entry is the one at
the smallest angle. transformers' `encode` normalises neither and finds other codes; its `decode`
agrees.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config.vision import VqConfig
from dsjax.model.layers import Constant, Float32, Normal, declare
from dsjax.parallel.sharding import constrain
from dsjax.precision.policy import Policy
from dsjax.vision.autoencoder import Decoder, Encoder
from dsjax.vision.convolution import Conv


class Vq(nnx.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, config: VqConfig, policy: Policy):
        latent, width = config.latent_channels, config.code_dim
        self.encoder = Encoder(config, latent, policy, attends=True)
        self.quant_conv = Conv(1, latent, width, policy)
        self.codebook = declare((config.n_codes, width), ("latent", "latent"), Normal(1.0))
        if config.usage:  # a record of DeepSeek's training, read by nothing
            self.usage = declare((config.usage,), ("norm",), Constant(0.0), Float32)
        self.post_quant_conv = Conv(1, width, latent, policy)
        self.decoder = Decoder(config, policy, attends=True)
        self.config, self.policy = config, policy

    @jax.named_scope("vq-encode")
    def encode(self, pixels_BYXC: jax.Array) -> jax.Array:
        """Finds the codes of pictures.

        Args:
          pixels_BYXC: float32 [B, size, size, 3], -1 to 1; the size a multiple of `config.scale`.

        Returns:
          int32 [B, rows, columns].
        """
        pixels_BYXC = constrain(pixels_BYXC, "batch", "tokens", "tokens", "width")
        latents = self.quant_conv(self.encoder(pixels_BYXC)).astype(jnp.float32)
        entries = unit(self.codebook[...].astype(jnp.float32))
        # Of unit vectors the nearest is the one with the largest product.
        products = jnp.einsum(
            "byxc,vc->byxv", unit(latents), entries, precision=jax.lax.Precision.HIGHEST
        )
        return products.argmax(axis=-1).astype(jnp.int32)

    @jax.named_scope("vq-decode")
    def decode(self, codes_BYX: jax.Array) -> jax.Array:
        """Draws codes, int32 [B, rows, columns]: float32 [B, size, size, 3], about -1 to 1."""
        codes_BYX = constrain(codes_BYX, "batch", "tokens", "tokens")
        entries = unit(self.codebook[...].astype(jnp.float32))[codes_BYX]
        return self.decoder(self.post_quant_conv(entries)).astype(jnp.float32)


def unit(x: jax.Array) -> jax.Array:
    """Scales vectors to length 1, as torch does: by at least 1e-12."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

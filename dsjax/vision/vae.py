"""The VAE of Stable Diffusion XL (arXiv:2307.01952), whose latents JanusFlow draws: pictures to
latents and back.

Names and mathematics are those of diffusers' AutoencoderKL. Latents here are those that a flow
sees, AutoencoderKL's times `config.scaling`. It computes in float32 alone: its activations exceed
what float16 holds, and rounded to bfloat16 they show in the picture.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config.vision import VaeConfig
from dsjax.parallel.sharding import constrain
from dsjax.precision.policy import Policy
from dsjax.vision.autoencoder import Decoder, Encoder
from dsjax.vision.convolution import Conv

# diffusers' bounds of the logarithm of a variance
_LEAST, _MOST = -30.0, 20.0


class Latents(NamedTuple):
    """What a picture's latents are drawn from: independent normal distributions."""

    mean_BYXC: jax.Array
    std_BYXC: jax.Array


class Vae(nnx.Module):
    """Encoder and decoder."""

    def __init__(self, config: VaeConfig, policy: Policy):
        assert policy.compute == jnp.float32, "this VAE computes in float32"
        C = config.latent_channels
        # a mean and the logarithm of a variance per latent
        self.encoder = Encoder(config, 2 * C, policy, attends=False)
        self.quant_conv = Conv(1, 2 * C, 2 * C, policy)
        self.post_quant_conv = Conv(1, C, C, policy)
        self.decoder = Decoder(config, policy, attends=False)
        self.config = config

    @jax.named_scope("vae-encode")
    def encode(self, pixels_BYXC: jax.Array) -> Latents:
        """Encodes pictures, float32 [B, rows, columns, 3] of -1 to 1: rows and columns are
        multiples of `config.scale`, by which they are divided.
        """
        pixels_BYXC = constrain(pixels_BYXC, "batch", "tokens", "tokens", "width")
        moments = self.quant_conv(self.encoder(pixels_BYXC))
        mean_BYXC, logarithm_BYXC = jnp.split(moments, 2, axis=-1)
        std_BYXC = jnp.exp(jnp.clip(logarithm_BYXC, _LEAST, _MOST) / 2)
        return Latents(mean_BYXC * self.config.scaling, std_BYXC * self.config.scaling)

    @jax.named_scope("vae-decode")
    def decode(self, latents_BYXC: jax.Array) -> jax.Array:
        """Draws latents: float32 [B, rows, columns, 3], about -1 to 1."""
        latents_BYXC = constrain(latents_BYXC, "batch", "tokens", "tokens", "width")
        return self.decoder(self.post_quant_conv(latents_BYXC / self.config.scaling))

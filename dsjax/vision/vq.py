"""The VQ tokenizer of Janus: pictures to codes and back (LlamaGen, arXiv:2406.06525, section 3.1).

Arrays are [batch, rows, columns, channels]; pixels run from -1 to 1. Sources: Janus' own code. Two
things that are easily got wrong: halving pads at the right and the bottom only, and both sides of
the comparison with the codebook are normalised, so that the nearest entry is the one at the
smallest angle. transformers' `encode` normalises neither and finds other codes; its `decode`
agrees.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config.vision import GROUPS, VqConfig
from dsjax.model.layers import Constant, Float32, Normal, declare
from dsjax.parallel.sharding import constrain
from dsjax.precision.policy import Policy
from dsjax.vision.convolution import Conv

_EPS = 1e-6


class GroupNorm(nnx.Module):
    """Normalises groups of neighbouring channels over the whole picture, in float32."""

    def __init__(self, channels: int):
        self.weight = declare((channels,), ("norm",), Constant(1.0))
        self.bias = declare((channels,), ("norm",), Constant(0.0))

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        B, Y, X, C = x_BYXC.shape
        x = x_BYXC.astype(jnp.float32).reshape(B, Y * X, GROUPS, C // GROUPS)
        x = x - x.mean(axis=(1, 3), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=(1, 3), keepdims=True) + _EPS)
        weight, bias = (
            v[...].astype(jnp.float32)[None, None, None] for v in (self.weight, self.bias)
        )
        return (x.reshape(x_BYXC.shape) * weight + bias).astype(x_BYXC.dtype)


class Residual(nnx.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, policy: Policy):
        self.norm1 = GroupNorm(channels_in)
        self.conv1 = Conv(3, channels_in, channels, policy)
        self.norm2 = GroupNorm(channels)
        self.conv2 = Conv(3, channels, channels, policy)
        if channels_in != channels:
            self.nin_shortcut = Conv(1, channels_in, channels, policy)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        y_BYXC = self.conv1(jax.nn.silu(self.norm1(x_BYXC)))
        y_BYXC = self.conv2(jax.nn.silu(self.norm2(y_BYXC)))
        return y_BYXC + (self.nin_shortcut(x_BYXC) if hasattr(self, "nin_shortcut") else x_BYXC)


class Attention(nnx.Module):
    """Attention of every place to every place, with one head."""

    def __init__(self, channels: int, policy: Policy):
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v, self.proj_out = (
            Conv(1, channels, channels, policy) for _ in range(4)
        )

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        B, Y, X, C = x_BYXC.shape
        normed = self.norm(x_BYXC)
        q, k, v = (conv(normed).reshape(B, Y * X, 1, C) for conv in (self.q, self.k, self.v))
        attended = jax.nn.dot_product_attention(q, k, v)
        return x_BYXC + self.proj_out(attended.reshape(x_BYXC.shape))


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention at the coarsest."""

    def __init__(self, widths: list[int], policy: Policy, *, attends: bool, resamples: bool):
        pairs = itertools.pairwise(widths)
        self.blocks = nnx.List(Residual(before, after, policy) for before, after in pairs)
        self.attentions = nnx.List(
            Attention(width, policy) for width in (widths[1:] if attends else ())
        )
        if resamples:
            self.resample = Conv(3, widths[-1], widths[-1], policy)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        for place, block in enumerate(self.blocks):
            x_BYXC = block(x_BYXC)
            if self.attentions:
                x_BYXC = self.attentions[place](x_BYXC)
        return x_BYXC


class Middle(nnx.Module):
    """What encoder and decoder do at the coarsest resolution."""

    def __init__(self, channels: int, policy: Policy):
        self.before = Residual(channels, channels, policy)
        self.attention = Attention(channels, policy)
        self.after = Residual(channels, channels, policy)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        return self.after(self.attention(self.before(x_BYXC)))


class Encoder(nnx.Module):
    """Pixels to latents."""

    def __init__(self, config: VqConfig, policy: Policy):
        widths = [config.channels * times for times in config.multipliers]
        last = len(widths) - 1
        self.conv_in = Conv(3, 3, config.channels, policy)
        self.levels = nnx.List(
            Level(
                [before, *[width] * config.n_blocks],
                policy,
                attends=place == last,
                resamples=place < last,
            )
            for place, (before, width) in enumerate(
                zip([config.channels, *widths], widths, strict=False)
            )
        )
        self.middle = Middle(widths[-1], policy)
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv(3, widths[-1], config.latent_channels, policy)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x_BYXC = self.conv_in(x_BYXC)
        for level in self.levels:
            x_BYXC = level(x_BYXC)
            if hasattr(level, "resample"):
                x_BYXC = level.resample(x_BYXC, stride=2, padding=(0, 1))
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x_BYXC))))


class Decoder(nnx.Module):
    """Latents to pixels; the levels run from coarse to fine."""

    def __init__(self, config: VqConfig, policy: Policy):
        widths = [config.channels * times for times in reversed(config.multipliers)]
        last = len(widths) - 1
        self.conv_in = Conv(3, config.latent_channels, widths[0], policy)
        self.middle = Middle(widths[0], policy)
        self.levels = nnx.List(
            Level(
                [before, *[width] * (config.n_blocks + 1)],
                policy,
                attends=place == 0,
                resamples=place < last,
            )
            for place, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv(3, widths[-1], 3, policy)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x_BYXC = self.middle(self.conv_in(x_BYXC))
        for level in self.levels:
            x_BYXC = level(x_BYXC)
            if hasattr(level, "resample"):
                doubled = x_BYXC.repeat(2, axis=1).repeat(2, axis=2)
                x_BYXC = level.resample(doubled)
        return self.conv_out(jax.nn.silu(self.norm_out(x_BYXC)))


class Vq(nnx.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, config: VqConfig, policy: Policy):
        latent, width = config.latent_channels, config.code_dim
        self.encoder = Encoder(config, policy)
        self.quant_conv = Conv(1, latent, width, policy)
        self.codebook = declare((config.n_codes, width), ("latent", "latent"), Normal(1.0))
        if config.usage:  # a record of DeepSeek's training, read by nothing
            self.usage = declare((config.usage,), ("norm",), Constant(0.0), Float32)
        self.post_quant_conv = Conv(1, width, latent, policy)
        self.decoder = Decoder(config, policy)
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

"""The convolutional encoder and decoder of latent diffusion (arXiv:2112.10752), which Janus' VQ
tokenizer and SDXL's VAE have in common.

Arrays are [batch, rows, columns, channels]; pixels run from -1 to 1. `attends`: whether the blocks
of the coarsest level attend, as the VQ tokenizer's do; those in the middle always do. Halving pads
at the right and the bottom only.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config.vision import AutoencoderConfig
from dsjax.kernels.attention import full_attention
from dsjax.model.layers import Constant, declare
from dsjax.precision.policy import Policy
from dsjax.vision.convolution import Conv

_EPS = 1e-6


class GroupNorm(nnx.Module):
    """Normalises groups of neighbouring channels over the whole picture, in float32."""

    def __init__(self, channels: int, n_groups: int):
        self.weight = declare((channels,), ("norm",), Constant(1.0))
        self.bias = declare((channels,), ("norm",), Constant(0.0))
        self.n_groups = n_groups

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        B, Y, X, C = x_BYXC.shape
        x = x_BYXC.astype(jnp.float32).reshape(B, Y * X, self.n_groups, C // self.n_groups)
        x = x - x.mean(axis=(1, 3), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=(1, 3), keepdims=True) + _EPS)
        weight, bias = (
            v[...].astype(jnp.float32)[None, None, None] for v in (self.weight, self.bias)
        )
        return (x.reshape(x_BYXC.shape) * weight + bias).astype(x_BYXC.dtype)


class Residual(nnx.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, n_groups: int, policy: Policy):
        self.norm1 = GroupNorm(channels_in, n_groups)
        self.conv1 = Conv(3, channels_in, channels, policy)
        self.norm2 = GroupNorm(channels, n_groups)
        self.conv2 = Conv(3, channels, channels, policy)
        if channels_in != channels:
            self.nin_shortcut = Conv(1, channels_in, channels, policy)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        y_BYXC = self.conv1(jax.nn.silu(self.norm1(x_BYXC)))
        y_BYXC = self.conv2(jax.nn.silu(self.norm2(y_BYXC)))
        return y_BYXC + (self.nin_shortcut(x_BYXC) if hasattr(self, "nin_shortcut") else x_BYXC)


class Attention(nnx.Module):
    """Attention of every place to every place, with one head."""

    def __init__(self, channels: int, n_groups: int, policy: Policy):
        self.norm = GroupNorm(channels, n_groups)
        self.q, self.k, self.v, self.proj_out = (
            Conv(1, channels, channels, policy) for _ in range(4)
        )

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        B, Y, X, C = x_BYXC.shape
        normed = self.norm(x_BYXC)
        q, k, v = (conv(normed).reshape(B, Y * X, 1, C) for conv in (self.q, self.k, self.v))
        attended = full_attention(q, k, v)
        return x_BYXC + self.proj_out(attended.reshape(x_BYXC.shape))


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention if it attends."""

    def __init__(
        self, widths: list[int], n_groups: int, policy: Policy, *, attends: bool, resamples: bool
    ):
        pairs = itertools.pairwise(widths)
        self.blocks = nnx.List(Residual(before, after, n_groups, policy) for before, after in pairs)
        self.attentions = nnx.List(
            Attention(width, n_groups, policy) for width in (widths[1:] if attends else ())
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

    def __init__(self, channels: int, n_groups: int, policy: Policy):
        self.before = Residual(channels, channels, n_groups, policy)
        self.attention = Attention(channels, n_groups, policy)
        self.after = Residual(channels, channels, n_groups, policy)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        return self.after(self.attention(self.before(x_BYXC)))


class Encoder(nnx.Module):
    """Pixels to `channels` numbers per latent."""

    def __init__(self, config: AutoencoderConfig, channels: int, policy: Policy, *, attends: bool):
        widths = [config.channels * times for times in config.multipliers]
        last = len(widths) - 1
        self.conv_in = Conv(3, 3, config.channels, policy)
        self.levels = nnx.List(
            Level(
                [before, *[width] * config.n_blocks],
                config.n_groups,
                policy,
                attends=attends and place == last,
                resamples=place < last,
            )
            for place, (before, width) in enumerate(
                zip([config.channels, *widths], widths, strict=False)
            )
        )
        self.middle = Middle(widths[-1], config.n_groups, policy)
        self.norm_out = GroupNorm(widths[-1], config.n_groups)
        self.conv_out = Conv(3, widths[-1], channels, policy)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x_BYXC = self.conv_in(x_BYXC)
        for level in self.levels:
            x_BYXC = level(x_BYXC)
            if hasattr(level, "resample"):
                x_BYXC = level.resample(x_BYXC, stride=2, padding=(0, 1))
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x_BYXC))))


class Decoder(nnx.Module):
    """Numbers per latent to pixels; the levels run from coarse to fine."""

    def __init__(self, config: AutoencoderConfig, policy: Policy, *, attends: bool):
        widths = [config.channels * times for times in reversed(config.multipliers)]
        last = len(widths) - 1
        self.conv_in = Conv(3, config.latent_channels, widths[0], policy)
        self.middle = Middle(widths[0], config.n_groups, policy)
        self.levels = nnx.List(
            Level(
                [before, *[width] * (config.n_blocks + 1)],
                config.n_groups,
                policy,
                attends=attends and place == 0,
                resamples=place < last,
            )
            for place, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out = GroupNorm(widths[-1], config.n_groups)
        self.conv_out = Conv(3, widths[-1], 3, policy)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x_BYXC = self.middle(self.conv_in(x_BYXC))
        for level in self.levels:
            x_BYXC = level(x_BYXC)
            if hasattr(level, "resample"):
                doubled = x_BYXC.repeat(2, axis=1).repeat(2, axis=2)
                x_BYXC = level.resample(doubled)
        return self.conv_out(jax.nn.silu(self.norm_out(x_BYXC)))

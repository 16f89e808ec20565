"""The shallow U-ViTs of JanusFlow (arXiv:2411.07975, section 3.2): noisy latents to the inputs of
the language model, and its outputs to a velocity.

Both are ConvNeXt blocks (arXiv:2301.00808) whose outputs the time scales and shifts. What the first
made of the latents is concatenated to the second's input. Arrays are [batch, rows, columns,
channels]. Three things that are easily got wrong: cosines come before sines, the scale before the
shift, and a response norm compares channels by their size over the whole picture.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config.vision import PATCH, FlowConfig
from dsjax.model.layers import Constant, RMSNorm, declare
from dsjax.precision.policy import Policy
from dsjax.vision.convolution import Conv, Depthwise
from dsjax.vision.projector import Linear, gelu

_WINDOW = 7  # side of a depthwise convolution
_WIDER = 4  # times the channels, inside a block


def frequencies(time_B: jax.Array, width: int) -> jax.Array:
    """Turns times of 0 to 1 into waves: float32 [B, width], all cosines, then all sines."""
    half = width // 2
    steps = jnp.arange(half, dtype=jnp.float32) / half
    angles = 1000 * time_B.astype(jnp.float32)[:, None] * jnp.exp(-math.log(10_000) * steps)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Embeds a time in the language model's width."""

    def __init__(self, width: int, dim: int, policy: Policy):
        self.linear_1 = Linear(("latent", "embed"), (width, dim), policy)
        self.linear_2 = Linear(("latent", "embed"), (dim, dim), policy)
        self.width, self.policy = width, policy

    def __call__(self, time_B: jax.Array) -> jax.Array:
        waves = frequencies(time_B, self.width).astype(self.policy.compute)
        return self.linear_2(jax.nn.silu(self.linear_1(waves)))


class ResponseNorm(nnx.Module):
    """Strengthens channels that are large beside the others (ConvNeXt V2's global response norm),
    in float32.
    """

    def __init__(self, channels: int):
        # as JanusFlow's: at first it changes nothing
        self.weight = declare((channels,), ("norm",), Constant(0.0))
        self.bias = declare((channels,), ("norm",), Constant(0.0))

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x = x_BYXC.astype(jnp.float32)
        squares = jnp.square(x).sum(axis=(1, 2), keepdims=True)
        # A root has no slope at 0, which is what a channel has that GELU silences everywhere.
        size = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
        response = size / (size.mean(axis=-1, keepdims=True) + 1e-6)
        weight, bias = (
            v[...].astype(jnp.float32)[None, None, None] for v in (self.weight, self.bias)
        )
        return (x * (weight * response + 1) + bias).astype(x_BYXC.dtype)


class ConvNext(nnx.Module):
    """A block of convolution and mixing of channels beside a shortcut, then scaled and shifted."""

    def __init__(self, channels: int, dim: int, eps: float, policy: Policy):
        wide = _WIDER * channels
        self.depthwise = Depthwise(_WINDOW, channels, policy)
        self.norm = RMSNorm(channels, eps)
        self.widen = Linear(("latent", "ffn"), (channels, wide), policy)
        self.response = ResponseNorm(wide)
        self.narrow = Linear(("ffn", "latent"), (wide, channels), policy)
        self.modulate = Linear(("embed", "latent"), (dim, 2 * channels), policy)

    def __call__(self, x_BYXC: jax.Array, time_BD: jax.Array) -> jax.Array:
        y_BYXC = self.widen(self.norm(self.depthwise(x_BYXC)))
        y_BYXC = x_BYXC + self.narrow(self.response(gelu(y_BYXC)))
        modulation = self.modulate(jax.nn.silu(time_BD))[:, None, None]
        scale, shift = jnp.split(
            jnp.broadcast_to(modulation, (*y_BYXC.shape[:-1], modulation.shape[-1])), 2, axis=-1
        )
        return y_BYXC * (1 + scale) + shift


class UvitEncoder(nnx.Module):
    """Noisy latents to positions of the language model."""

    def __init__(self, config: FlowConfig, dim: int, policy: Policy):
        C = config.channels
        self.time = TimeEmbedding(C, dim, policy)
        self.conv_in = Conv(PATCH, config.latent_channels, C, policy)
        self.blocks = nnx.List(
            ConvNext(C, dim, config.norm_eps, policy) for _ in range(config.encoder_blocks)
        )

    def __call__(self, latents_BYXC: jax.Array, time_BD: jax.Array) -> jax.Array:
        """Returns [B, rows / PATCH, columns / PATCH, channels]."""
        x_BYXC = self.conv_in(latents_BYXC, stride=PATCH, padding=(0, 0))
        for block in self.blocks:
            x_BYXC = block(x_BYXC, time_BD)
        return x_BYXC


class UvitDecoder(nnx.Module):
    """Positions of the language model to a velocity of latents."""

    def __init__(self, config: FlowConfig, dim: int, policy: Policy):
        C, eps = config.channels, config.norm_eps
        self.norm_in = RMSNorm(C, eps)
        self.blocks = nnx.List(
            ConvNext(2 * C, dim, eps, policy) for _ in range(config.decoder_blocks)
        )
        self.norm_out = RMSNorm(2 * C, eps)
        self.conv_out = Conv(1, 2 * C, config.latent_channels * PATCH**2, policy)

    def __call__(self, x_BYXC: jax.Array, skip_BYXC: jax.Array, time_BD: jax.Array) -> jax.Array:
        """Returns [B, PATCH * rows, PATCH * columns, latent channels].

        Args:
          skip_BYXC: the encoder's output.
        """
        x_BYXC = jnp.concatenate([self.norm_in(x_BYXC), skip_BYXC], axis=-1)
        for block in self.blocks:
            x_BYXC = block(x_BYXC, time_BD)
        return unfold(self.conv_out(self.norm_out(x_BYXC)))


def unfold(x_BYXC: jax.Array) -> jax.Array:
    """Lays each position's channels out as a square of PATCH x PATCH, of which they hold channel,
    row and column in this order (torch's pixel shuffle).
    """
    B, Y, X, C = x_BYXC.shape
    split = x_BYXC.reshape(B, Y, X, C // PATCH**2, PATCH, PATCH)
    return split.transpose(0, 1, 4, 2, 5, 3).reshape(B, Y * PATCH, X * PATCH, C // PATCH**2)

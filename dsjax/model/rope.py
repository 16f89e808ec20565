"""Rotary position embedding: frequencies (plain, linear, YaRN, Llama 3) and the two rotations.

MLA rotates adjacent pairs (channels 0 and 1, 2 and 3, ...), as the released weights expect; the
dense family rotates channel i with channel i + R/2. Angles and rotation are float32.

Papers: RoPE arXiv:2104.09864; YaRN arXiv:2309.00071, as used in DeepSeek-V2 section 3.1.4 and V3
section 4.3.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Returns radians per position for each rotated pair: float64 [R/2]."""
    dim = config.rope_dim
    plain = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if config.rope_scaling == "linear":
        return plain / config.rope_factor
    if config.rope_scaling == "yarn":
        return _yarn(plain, config)
    if config.rope_scaling == "llama3":
        return _llama3(plain, config)
    return plain


def _yarn(plain: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Divides slow channels by the factor, keeps fast ones, and interpolates in between."""
    dim = config.rope_dim

    def channel_turning(rotations: float) -> float:
        """Returns the channel that makes that many turns over the original length."""
        return (
            dim
            * math.log(config.original_seq_len / (rotations * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(channel_turning(config.beta_fast)), 0)
    high = min(math.ceil(channel_turning(config.beta_slow)), dim - 1)
    slow = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain * (1 - slow) + plain / config.rope_factor * slow


def _llama3(plain: np.ndarray, config: ModelConfig) -> np.ndarray:
    wavelength = 2 * math.pi / plain
    turns = config.original_seq_len / wavelength - config.low_freq_factor
    # Equal factors leave no ramp: a wavelength is either short or long.
    span = config.high_freq_factor - config.low_freq_factor
    fast = np.clip(turns / span, 0, 1) if span else (turns > 0).astype(np.float64)
    return plain * fast + plain / config.rope_factor * (1 - fast)


def _yarn_temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def attention_scale(config: ModelConfig) -> float:
    """Returns the factor on scores: 1 / sqrt(head width), times YaRN's temperature squared."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling == "yarn" and config.mscale_all_dim:
        scale *= _yarn_temperature(config.rope_factor, config.mscale_all_dim) ** 2
    return scale


def _rotation_scale(config: ModelConfig) -> float:
    """Returns YaRN's factor on cos and sin: 1 if the two mscales agree, as in all releases."""
    if config.rope_scaling != "yarn":
        return 1.0
    temperature = _yarn_temperature(config.rope_factor, config.mscale)
    return temperature / _yarn_temperature(config.rope_factor, config.mscale_all_dim)


def angles(positions_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Computes cosine and sine of each position and pair: float32 [B, T, R/2] each."""
    frequencies = jnp.asarray(inverse_frequencies(config), jnp.float32)
    angle_BTR = positions_BT.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    scale = _rotation_scale(config)
    return jnp.cos(angle_BTR) * scale, jnp.sin(angle_BTR) * scale


def rotate_pairs(x_BTNR: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotates channels 2i and 2i + 1 as a pair; returns x's dtype."""
    x32 = x_BTNR.astype(jnp.float32)
    even, odd = x32[..., 0::2], x32[..., 1::2]
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BTNR.shape).astype(x_BTNR.dtype)


def rotate_last(x_BTNH: jax.Array, count: int, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotates the last `count` channels of each head as `rotate_pairs` does (V4)."""
    plain, turned = jnp.split(x_BTNH, [x_BTNH.shape[-1] - count], axis=-1)
    return jnp.concatenate([plain, rotate_pairs(turned, cos_BTR, sin_BTR)], axis=-1)


def rotate_halves(x_BTNR: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotates channels i and i + R/2 as a pair; returns x's dtype."""
    first, second = jnp.split(x_BTNR.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNR.dtype)


def positions_in_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns each token's position within its run of equal segment ids: int32 [..., T]."""
    last = segment_ids_BT.ndim - 1
    index = jax.lax.broadcasted_iota(jnp.int32, segment_ids_BT.shape, last)
    starts = jnp.pad(
        segment_ids_BT[..., 1:] != segment_ids_BT[..., :-1],
        ((0, 0),) * last + ((1, 0),),
        constant_values=True,
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=last)

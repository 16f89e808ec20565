"""Rotary position embedding: RoFormer (arXiv:2104.09864), YaRN (2309.00071), Llama 3.1's and linear
scaling."""

from __future__ import annotations

import math

import numpy as np

from dsjax.config import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each rotated pair [rope_dim / 2]."""
    dim = config.rope_dim
    plain = [config.rope_theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    rule = {"none": _plain, "linear": _linear, "yarn": _yarn, "llama3": _llama3}[
        config.rope_scaling
    ](config)
    return np.array([rule(pair, frequency) for pair, frequency in enumerate(plain)])


def _plain(config: ModelConfig):
    return lambda pair, frequency: frequency


def _linear(config: ModelConfig):
    return lambda pair, frequency: frequency / config.rope_factor


def _yarn(config: ModelConfig):
    """Pairs that turn often in the original length keep their frequency, those that turn less than
    once are stretched."""
    dim, theta, length = config.rope_dim, config.rope_theta, config.original_seq_len

    def pair_turning(rotations: float) -> float:
        # theta ** (-2 * pair / dim) * length = 2 pi rotations, solved for the pair
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(config.beta_fast)), 0)
    high = min(math.ceil(pair_turning(config.beta_slow)), dim - 1)

    def rule(pair: int, frequency: float) -> float:
        stretched = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
        return frequency * (1 - stretched) + frequency / config.rope_factor * stretched

    return rule


def _llama3(config: ModelConfig):
    """By wavelength: short ones stay, long ones are stretched, in between the two are blended."""

    def rule(_: int, frequency: float) -> float:
        turns = config.original_seq_len * frequency / (2 * math.pi)
        if turns > config.high_freq_factor:
            return frequency
        if turns < config.low_freq_factor:
            return frequency / config.rope_factor
        smooth = (turns - config.low_freq_factor) / (
            config.high_freq_factor - config.low_freq_factor
        )
        return (1 - smooth) * frequency / config.rope_factor + smooth * frequency

    return rule


def temperature(config: ModelConfig, mscale: float) -> float:
    """YaRN's 0.1 m ln(s) + 1."""
    if config.rope_scaling != "yarn" or config.rope_factor <= 1:
        return 1.0
    return 0.1 * mscale * math.log(config.rope_factor) + 1.0


def amplitude(config: ModelConfig) -> float:
    """Factor on cos and sin."""
    return temperature(config, config.mscale) / temperature(config, config.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    return config.qk_head_dim**-0.5 * temperature(config, config.mscale_all_dim) ** 2


def rotate_pairs(x_TR: np.ndarray, positions_T: np.ndarray, config: ModelConfig) -> np.ndarray:
    """MLA: channels (2i, 2i + 1) are one complex number."""
    angles = np.outer(positions_T, frequencies(config))
    turned = (x_TR[:, 0::2] + 1j * x_TR[:, 1::2]) * np.exp(1j * angles) * amplitude(config)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x_TR.shape)


def rotate_halves(x_TR: np.ndarray, positions_T: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Llama: channels (i, i + R / 2) are one complex number."""
    half = x_TR.shape[1] // 2
    angles = np.outer(positions_T, frequencies(config))
    turned = (x_TR[:, :half] + 1j * x_TR[:, half:]) * np.exp(1j * angles) * amplitude(config)
    return np.concatenate([turned.real, turned.imag], axis=1)

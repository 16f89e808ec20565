"""A small JanusFlow and a small VAE of its kind: config.json, weights and inputs, all from a seed.

No weight is zero, not even those that training begins with as zeros, which would hide mistakes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.checkpoint import normal_like, uniform

SEED = 11
DIM, CHANNELS, GRID, LATENTS = 64, 32, 4, 4
TOWER = {"width": 32, "layers": 2, "heads": 2, "patch_size": 4, "mlp_ratio": 4}
IMAGE = GRID * TOWER["patch_size"]
PAD, BEGIN, PLACEHOLDER = 1, 2, 3
PROMPT = (0, 40, 50, 60, 70, 80, BEGIN)
STEPS, GUIDANCE, PICTURES = 4, 5.0, 5
GOLDEN = Path(__file__).parent / "janusflow.npz"


def _section(cls: str, kind: str, **params: Any) -> dict[str, Any]:
    return {"cls": cls, "model_type": kind, "params": params}


CONFIG = {
    "architectures": ["MultiModalityCausalLM"],
    "model_type": "multi_modality",
    "torch_dtype": "float32",
    "language_config": {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": DIM,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
    },
    "vision_und_enc_config": _section(
        "CLIPVisionTower",
        "vision_und_enc",
        image_size=IMAGE,
        model_name="siglip_large_patch16_384",
        select_feature="same",
        select_layer=-1,
    ),
    "vision_gen_enc_config": _section(
        "ShallowUViTEncoder",
        "vision_gen_enc",
        input_channels=LATENTS,
        stride=2,
        kernel_size=2,
        padding=0,
        block_out_channels=[CHANNELS],
        layers_in_middle=2,
        hidden_size=DIM,
    ),
    "vision_gen_dec_config": _section(
        "ShallowUViTDecoder",
        "vision_gen_dec",
        in_channels=CHANNELS,
        out_channels=LATENTS,
        block_out_channels=[CHANNELS],
        upsamples=1,
        layers_in_middle=2,
        hidden_size=DIM,
    ),
}
VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "latent_channels": LATENTS,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "scaling_factor": 0.13025,
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor as published; activations keep a size of about 1."""
    if name.endswith("bias"):
        return normal_like(SEED, name, shape, 0.5)
    if math.prod(shape) == shape[-1] and "embed" not in name:
        return uniform(SEED, name, shape, 0.5, 1.5)
    if "embed" in name and "patch" not in name and "time" not in name:
        return normal_like(SEED, name, shape)
    # Attention is sharp and weighs much, so that what a row does not see shows in what it draws.
    stronger = {"q_proj": 3.0, "o_proj": 6.0}.get(name.split(".")[-2], 1.0)
    return normal_like(SEED, name, shape, stronger * math.prod(shape[1:]) ** -0.5)


def inputs() -> dict[str, np.ndarray]:
    """What single parts are tried on, channels last."""
    ids = np.floor(uniform(SEED, "ids", (1, 2 * GRID**2 + 14), 4, 97)).astype(np.int64)
    for first in (3, 8 + GRID**2):
        ids[0, first] = BEGIN
        ids[0, first + 1 : first + 1 + GRID**2] = PLACEHOLDER
    side = 2 * GRID
    return {
        "ids": ids,
        "pixels": uniform(SEED, "pixels", (2, IMAGE, IMAGE, 3), -1, 1),
        "latents": normal_like(SEED, "latents", (3, side, side, LATENTS)),
        "times": np.array([0.0, 0.3, 29 / 30], np.float32),
        "states": normal_like(SEED, "states", (3, GRID**2, DIM)),
        "noise": normal_like(SEED, "noise", (PICTURES, side, side, LATENTS)),
    }

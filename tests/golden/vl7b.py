"""A small DeepSeek-VL 7B in DeepSeek's own layout, a picture and a conversation: what make_vl7b.py
gives DeepSeek's code, and tests give ours.

DeepSeek's code spells out the grid of 24 x 24 features, the windows of 14 and the picture's pixels
per patch of SAM; widths and depths are small here. No weight is zero, not even the factor of the
second neck, which training begins with as zero.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dsjax.checkpoint import names
from dsjax.checkpoint.families import deepseek_tower, deepseek_towers
from dsjax.checkpoint.hf_config import from_hf, vision_of
from dsjax.config.vision import SamConfig, SiglipConfig
from dsjax.files import write_json
from dsjax.vision.pictures import SAM_NORM, SIGLIP_NORM
from tests.checkpoint import hf_files
from tests.golden.checkpoint import normal_like, uniform
from tests.text.released import BOS, EOS, make_tokenizer

FILE = Path(__file__).parent / "vl7b.npz"
SEED, DIM = 17, 32
# 8 / 3 of the smaller picture's side, as 1024 and 384, and 16 patches, which windows do not divide
LOW, HIGH, GRID = 96, 256, 24
CONTROL = {BOS: 0, EOS: 1, "<image_placeholder>": 2}
VOCABULARY = 280
SIZES = ((250, 190), (60, 333))  # of the pictures, widths and heights
QUESTION = "What is on them?"
POSITIONS, NEW_TOKENS, EVERY = 12, 8, 16  # logits stored, tokens after them; features stored
TOWER = {"width": 24, "layers": 2, "heads": 2, "patch_size": 4, "mlp_ratio": 3}
SAM = {
    "width": 24, "layers": 4, "heads": 3, "global_attn_indexes": [1, 3], "prompt_embed_dim": 6,
    "downsample_channels": (12, 24),
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["MultiModalityCausalLM"],
    "model_type": "multi_modality",
    "torch_dtype": "float32",
    "language_config": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": DIM,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "vision_config": {
        "cls": "HybridVisionTower",
        "model_type": "vision",
        "params": {
            "concat_type": "tuple",
            "freeze_high": True,
            "freeze_low": True,
            "high_res_cfg": {
                "ckpt_path": "",
                "image_size": HIGH,
                "model_name": "sam_b_downsample",
                "output_dim": 24,
                "pixel_mean": list(SAM_NORM[0]),
                "pixel_std": list(SAM_NORM[1]),
                "select_feature": "same",
                "select_layer": -1,
            },
            "low_res_cfg": {
                "ckpt_path": "",
                "image_size": LOW,
                "model_name": "siglip_large_patch16_384",
                "output_dim": 24,
                "pixel_mean": list(SIGLIP_NORM[0]),
                "pixel_std": list(SIGLIP_NORM[1]),
                "select_feature": "same",
                "select_layer": -1,
            },
        },
    },
    "aligner_config": {
        "cls": "MlpProjector",
        "model_type": "aligner",
        "params": {
            "depth": 2,
            "input_dim": 24,
            "n_embed": DIM,
            "projector_type": "low_high_hybrid_split_mlp_gelu",
        },
    },
}
PROCESSOR = {
    "image_processor_type": "VLMImageProcessor",
    "do_normalize": False,
    "image_size": HIGH,
    "image_mean": list(SAM_NORM[0]),
    "image_std": list(SAM_NORM[1]),
    "min_size": 14,
    "rescale_factor": 0.00392156862745098,
}


def shrink(monkeypatch: Any) -> None:
    """Makes DeepSeek's layout one of towers as small as these."""
    siglip = SiglipConfig(
        image_size=LOW, patch_size=4, dim=24, n_layers=2, n_heads=2, inter_dim=72, pool=True
    )
    sam = SamConfig(
        image_size=HIGH, dim=24, n_layers=4, n_heads=3, inter_dim=96, global_layers=(1, 3),
        out_channels=6,
    )  # fmt: skip
    monkeypatch.setattr(deepseek_tower, "TOWER", siglip)
    monkeypatch.setattr(deepseek_towers, "SAM", sam)


def picture(place: int) -> PIL.Image.Image:
    """Smooth waves and noise, so that how it is resized shows."""
    width, height = SIZES[place]
    noise = uniform(SEED, f"picture {place}", (height, width, 3), 0, 256)
    waves = 128 + 100 * np.sin(np.arange(width) / 9)[None, :, None]
    return PIL.Image.fromarray(((noise + waves) / 2).clip(0, 255).astype(np.uint8))


def tokenizer() -> Any:
    return make_tokenizer(CONTROL)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor as published; activations keep a size of about 1."""
    if name.endswith("bias"):
        return normal_like(SEED, name, shape, 0.3)
    if "rel_pos" in name:
        return normal_like(SEED, name, shape, 0.3)
    if len(shape) == 1:
        return uniform(SEED, name, shape, 0.5, 1.5)
    if name.endswith(("pos_embed", "latent", "embed_tokens.weight")):
        return normal_like(SEED, name, shape)
    return normal_like(SEED, name, shape, math.prod(shape[1:]) ** -0.5)


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors, once the layout is as small; see `shrink`."""
    vision = vision_of(CONFIG)
    assert vision
    named = {row.name: row.shape for row in names.tensors(from_hf(CONFIG), "multi_modality")}
    return named | {part.name: part.shape for part in deepseek_towers.parts(vision)}


def write(folder: Path) -> Path:
    """Writes the checkpoint's folder, once the layout is as small; see `shrink`."""
    hf_files.write(folder, CONFIG, {name: weight(name, shape) for name, shape in shapes().items()})
    tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": BOS, "eos_token": EOS})
    write_json(folder / "preprocessor_config.json", PROCESSOR)
    return folder

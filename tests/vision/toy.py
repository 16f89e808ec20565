"""A small Janus with random weights, in memory and as a folder that transformers would write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint import families, names
from dsjax.checkpoint.families import deepseek_tower, multi_modality
from dsjax.checkpoint.hf_config import to_hf
from dsjax.config import ModelConfig
from dsjax.config.vision import FlowConfig, SiglipConfig, VisionConfig, VqConfig
from dsjax.files import write_json
from dsjax.vision.pictures import Picture
from tests.checkpoint import hf_files
from tests.text.released import BOS, EOS, make_tokenizer

ROLES = ("<|User|>", "<|Assistant|>")
CONTROL = {BOS: 0, EOS: 1, "<\uff5c\u2581pad\u2581\uff5c>": 2} | {
    name: 259 + place
    for place, name in enumerate(
        (*ROLES, "<begin_of_image>", "<end_of_image>", "<image_placeholder>")
    )
}
PLACEHOLDER = CONTROL["<image_placeholder>"]
LANGUAGE = ModelConfig(
    vocab_size=264, dim=32, n_layers=2, n_dense_layers=2, n_heads=2, inter_dim=48, attention="gqa",
    n_kv_heads=2, head_dim=16, max_seq_len=512,
)  # fmt: skip
VISION = VisionConfig(
    dim=32,
    tower=SiglipConfig(image_size=9, patch_size=4, dim=16, n_layers=2, n_heads=2, inter_dim=32),
    vq=VqConfig(
        n_codes=40, code_dim=4, latent_channels=8, channels=32, multipliers=(1, 2), n_blocks=1
    ),
    head_dim=32,
    image_token=PLACEHOLDER,
)


def tensors(family: str, vision: VisionConfig = VISION, seed: int = 0) -> dict[str, np.ndarray]:
    """Published tensors; none of them is zero, and norms are about 1."""
    sight = families.find(family).sight
    assert sight is not None
    rng = np.random.default_rng(seed)
    shapes = {row.name: row.shape for row in names.tensors(LANGUAGE, family)}
    shapes |= {part.name: part.shape for part in sight.parts(vision)}
    made = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            values = rng.uniform(0.5, 1.5, shape) - (name.endswith("bias"))
        else:
            fan_in = 1 if "embed" in name and "patch" not in name else np.prod(shape[1:])
            values = rng.normal(size=shape) * fan_in**-0.5
        made[name] = values.astype(np.float32)
    return made


def write(folder: Path, family: str = "janus", vision: VisionConfig = VISION, **rules: Any) -> Path:
    """Writes a folder with a tokenizer."""
    config = to_hf(LANGUAGE, family, dtype="float32", vision=vision)
    hf_files.write(folder, config, tensors(family, vision))
    make_tokenizer(CONTROL).save(str(folder / "tokenizer.json"))
    size = vision.tower.image_size
    square = {"size": {"height": size, "width": size}}
    said: dict[str, Any] = {
        **({"image_size": size} if family == "multi_modality" else square),
        "min_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    write_json(folder / "preprocessor_config.json", said | rules)
    return folder


def pictures(n: int, seed: int = 0) -> list[Picture]:
    """Pictures of noise, of the tower's size."""
    size = VISION.tower.image_size
    noise = np.random.default_rng(seed).integers(0, 256, (n, 1, size, size, 3), np.uint8)
    return [Picture(squares, (size, size)) for squares in noise]


def shrink_deepseeks(monkeypatch: Any) -> None:
    """Makes DeepSeek's layout one of towers and tokenizers as small as these."""
    assert VISION.vq is not None
    tower = dataclasses.replace(VISION.tower, pool=True)
    vq = dataclasses.replace(VISION.vq, usage=50)
    monkeypatch.setattr(deepseek_tower, "TOWER", tower)
    monkeypatch.setattr(multi_modality, "VQ", vq)


def deepseeks() -> VisionConfig:
    """What DeepSeek's layout says of this model, once it is as small."""
    return dataclasses.replace(
        VISION, tower=deepseek_tower.TOWER, vq=multi_modality.VQ, image_token=None
    )


def flowing() -> VisionConfig:
    """What JanusFlow's layout says of a model as small, once it is; see `shrink_deepseeks`."""
    flow = FlowConfig(latent_channels=4, channels=8, encoder_blocks=1, decoder_blocks=1)
    tower = deepseek_tower.TOWER
    return VisionConfig(dim=VISION.dim, tower=tower, aligner_depth=1, flow=flow)

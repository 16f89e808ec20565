"""Pairs and text for a small Janus or JanusFlow, on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.janus import Janus, JanusConfig
from dsjax.config.posttraining import TuningConfig
from tests.checkpoint.test_vae import tensors as vae_tensors
from tests.checkpoint.test_vae import write as write_vae
from tests.vision import toy

COUNT = 9


def write(root: Path) -> Janus:
    """Writes a model, pairs and text; returns a config of a run of 4 steps, saved after 2 and 4."""
    base, pairs = toy.write(root / "base"), write_pairs(root / "pairs")
    lines = [json.dumps({"text": "to be read " * number}) for number in range(1, 9)]
    (root / "text.jsonl").write_text("\n".join(lines))
    return Janus(
        name="small",
        init=str(base),
        janus=JanusConfig(
            see=str(pairs), text=str(root / "text.jsonl"), draw=str(pairs), ratio=(2, 1, 1),
            sequence_length=500, heldout_fraction=0.25, cache_dir=str(root / "cache"), blank=0.5,
            question="?", seed=3,
        ),
        train=TuningConfig(
            steps=4, batch_size=8, micro_batch_size=4, log_every=1, eval_every=0,
            checkpoint_every=2, tensorboard=False, remat="none",
        ),
        optim=OptimConfig(
            learning_rate=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.1
        ),
        precision=PrecisionConfig(compute="float32"),
    )  # fmt: skip


def write_pairs(folder: Path) -> Path:
    """Writes pictures of several shapes, each with a text."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (9 + number, 11, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("noise " * (number % 3) + str(number))
    return folder


def write_flow(root: Path, monkeypatch: Any) -> Janus:
    """Writes the same for a model that draws by a flow, which is opened while the towers of its
    layout are as small; see `toy.shrink_deepseeks`.
    """
    config = write(root)
    toy.shrink_deepseeks(monkeypatch)
    base = toy.write(root / "flow", "multi_modality", toy.flowing())
    vae = write_vae(root / "vae", vae_tensors())
    return change(dataclasses.replace(config, init=str(base)), janus={"vae": str(vae)})


def change(config: Janus, **groups: dict[str, Any]) -> Janus:
    """Returns a config with other keys in some groups."""
    changed = {
        name: dataclasses.replace(getattr(config, name), **keys) for name, keys in groups.items()
    }
    return dataclasses.replace(config, **changed)

"""Gives an experiment that begins with a checkpoint the shape of that checkpoint, without weights:
for commands that describe or plan it where the checkpoint is not.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

from dsjax import settings
from dsjax.checkpoint import hub
from dsjax.checkpoint.hf_config import vision_of
from dsjax.checkpoint.hf_folder import check_kind
from dsjax.checkpoint.inspection import implied_by
from dsjax.config import Config, ModelConfig
from dsjax.config.janus import Janus
from dsjax.config.roots import ROOTS, Planned
from dsjax.config.vision import VisionConfig
from dsjax.files import read_json

AnyExperiment = TypeVar("AnyExperiment", bound=Planned)


def with_shape(config: AnyExperiment, init: str | None) -> AnyExperiment:
    """Returns the config with a model.

    Args:
      init: the checkpoint that it begins with, or a config of the same model; None: what the
        config itself names.

    Raises:
      ValueError: there is none or one too many, it cannot be read, or config and model break a
        rule.
    """
    if isinstance(config, Config):
        if init:
            raise ValueError(
                f"--init {init}: {config.name} pre-trains a model of its own; leave --init out"
            )
        return config
    init, known = init or config.init, config.model is not None
    if isinstance(config, Janus):
        known = known and config.vision is not None
    if known and init == config.init:
        return config
    if not init:
        of_text = ", or a config of the same model: --init CKPT or, for example, "
        of_text += "--init configs/v3_671b.py"
        sees = ", of which config.json is enough: --init Janus-Pro-1B"
        raise ValueError(
            f"{config.name} takes its model from the checkpoint that it begins with; name that"
            + (sees if isinstance(config, Janus) else of_text)
        )
    filled = {"vision": sight_of(Path(init))} if isinstance(config, Janus) else {}
    return dataclasses.replace(config, init=init, model=model_of(Path(init)), **filled)


def sight_of(path: Path) -> VisionConfig:
    """Reads what a published folder of a model that sees has beside its language model, of which
    config.json is enough.

    Raises:
      ValueError: it is another kind of checkpoint, or not supported.
      FileNotFoundError: there is no such folder.
    """
    path = hub.located(settings.find(path), weights=False)
    file = path / "config.json" if path.is_dir() else path
    values = read_json(file) if file.suffix == ".json" else {}
    vision = vision_of(values) if "model_type" in values else None
    if vision is None:
        raise ValueError(
            f"--init {path} is not the folder of a model that sees; name one of Janus, Janus-Pro, "
            "JanusFlow, DeepSeek-VL or VL2 as published, of which config.json is enough"
        )
    return vision


def model_of(path: Path) -> ModelConfig:
    """Reads the shape of a checkpoint of any kind, of which config.json is enough, or of a config.

    Raises:
      ValueError: there is none, or it is not supported.
      FileNotFoundError: there is no such config.
    """
    path = hub.located(settings.find(path), weights=False)
    if path.suffix == ".py":
        model = settings.load_any(path, ROOTS).model
        if model is None:
            raise ValueError(
                f"--init {path} takes its own model from a checkpoint; name a pre-training config"
            )
        return model
    if path.suffix != ".json":
        check_kind(path)
    return implied_by(path).model

"""A toy that learns to name and to draw coloured shapes, from nothing."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from dsjax.config.janus import Janus, TowerTraining, VqTraining
from dsjax.config.model import ModelConfig
from dsjax.config.rules import require, require_not_negative, require_positive
from dsjax.config.vision import VisionConfig

_FOLDERS = ("data", "autoencoder", "tokenizer", "tower", "start")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaintStage:
    """One run; it begins where the last one ended, in a folder of its name."""

    name: str
    config: Janus  # its files may begin with {run}, the folder of all runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColouredShapes:
    """A toy: its data, tokenizer, tower, model and stages."""

    tool: ClassVar[str] = "tools/shapes.py"

    name: str
    model: ModelConfig
    vision: VisionConfig
    autoencoder: VqTraining  # what the tokenizer begins with
    tokenizer: VqTraining
    tower: TowerTraining | None  # None: the tower of the first stage has random weights
    stages: tuple[PaintStage, ...]
    n_held_out: int = 216  # pictures, of 8,100, that nothing trains on
    n_drawings: int = 216  # by which drawing is judged, with each guidance
    guidances: tuple[float, ...] = (1.0, 1.5, 5.0)
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("shapes", self, "n_held_out", "n_drawings")
        require_not_negative("shapes", self, "seed")
        names = [stage.name for stage in self.stages]
        require(len(names) > 0, f"{self.name} has no stages; give one")
        require(
            len({*names, *_FOLDERS}) == len(names) + len(_FOLDERS),
            f"{self.name}: the stages {', '.join(names)} are folders beside {', '.join(_FOLDERS)}; "
            "give each a name of its own",
        )
        require(
            all(guidance >= 1 for guidance in self.guidances) and len(self.guidances) > 0,
            f"shapes.guidances={self.guidances} must be at least 1",
        )
        require(
            self.vision.vq == self.tokenizer.vq == self.autoencoder.vq,
            f"{self.name}: vision.vq, tokenizer.vq and autoencoder.vq differ; give all the same",
        )
        require(
            self.tower is None or self.tower.tower == self.vision.tower,
            f"{self.name}: vision.tower and tower.tower differ; give both the same",
        )

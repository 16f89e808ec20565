"""A pipeline of stages such as DeepSeek-R1's, each taking up where an earlier one ended."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from dsjax.config.finetuning import FineTuning
from dsjax.config.pretraining import Config
from dsjax.config.reinforcement import Reinforcement
from dsjax.config.rules import require, require_not_negative, require_positive

StageConfig = Config | FineTuning | Reinforcement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Game:
    """The countdown game's files, written to the folder `game` of a run; see
    `dsjax.posttrain.game`.
    """

    n_texts: int = 50_000  # that the base model reads
    n_cold: int = 20_000  # demonstrations
    n_held_out: int = 500  # problems that nothing trains on
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("game", self, "n_texts", "n_cold", "n_held_out")
        require_not_negative("game", self, "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Answers that a stage writes for another to learn from (rejection sampling).

    They go to `samples.jsonl` in the folder of the stage that learns from them.
    """

    stage: str  # the stage whose model answers
    problems: str  # file of problems
    n: int = 4  # answers per problem
    keep: Literal["right", "best", "all"] = "right"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_positive("samples", self, "n")
        require_not_negative("samples", self, "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of the pipeline.

    Paths in its config may begin with `{run}`, the folder of the whole pipeline; each stage has the
    folder of its name in it.
    """

    name: str
    config: StageConfig
    init: str = ""  # an earlier stage, or a checkpoint's path; empty for pre-training
    samples: Samples | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class R1:
    """A pipeline: stages in order, and how each is judged."""

    tool: ClassVar[str] = "tools/r1.py"

    name: str
    stages: tuple[Stage, ...]
    problems: str  # file of held-out problems
    rewards: tuple[str, ...] = ("countdown", "format")  # the first decides what is right
    n: int = 8  # answers per held-out problem
    max_new_tokens: int = 1024
    temperature: float = 1.0
    max_batch: int = 256  # answers that are generated at the same time
    examples: int = 5  # answers of each stage that the report shows
    game: Game | None = None  # None: the files that the configs name are there

    def __post_init__(self) -> None:
        require_positive("r1", self, "n", "max_new_tokens", "max_batch", "examples")
        require(len(self.stages) > 0, f"{self.name} has no stages; give one")
        earlier: list[str] = []
        for stage in self.stages:
            self._check(stage, earlier)
            earlier.append(stage.name)

    def _check(self, stage: Stage, earlier: list[str]) -> None:
        where = f"stage {stage.name}"
        require(
            stage.name.isidentifier(),
            f"{where}: a name is that of a folder and a part of --set keys; use letters, digits "
            "and _",
        )
        require(stage.name not in earlier, f"{where} is there twice; rename one")
        if isinstance(stage.config, Config):
            require(not stage.init, f"{where} pre-trains, so it cannot begin with {stage.init}")
        else:
            require(bool(stage.init), f"{where} needs init: an earlier stage, or a checkpoint")
        sampler = stage.samples.stage if stage.samples else ""
        for name in filter(None, (stage.init, sampler)):
            known = name in earlier or name not in {each.name for each in self.stages}
            require(known, f"{where} begins with {name}, which comes later; reorder them")
        require(
            not sampler or sampler in earlier,
            f"{where} learns from answers of {sampler}, which is no earlier stage; the stages "
            f"before it: {', '.join(earlier) or 'none'}",
        )

"""What every post-training experiment has: a checkpoint to begin with, and how to train it."""

from __future__ import annotations

import dataclasses

from dsjax.config.balance import check_balance_devices
from dsjax.config.mesh import MeshConfig
from dsjax.config.microbatches import check_microbatches, micro_batch_size
from dsjax.config.model import ModelConfig
from dsjax.config.rules import require
from dsjax.config.train import OptimConfig, PrecisionConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig(TrainConfig):
    """The same keys as in pre-training; the balance of a trained router is left alone."""

    bias_update_speed: float = 0.0
    sequence_balance: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostTraining:
    """The base of the roots for fine-tuning, preferences and reinforcement learning.

    A config file leaves `init` and `model` out. `--init` names the checkpoint, the program reads
    the model's shape from it, and the run's config.json holds both, so that the run is a
    checkpoint like any other.
    """

    name: str
    init: str = ""  # path of the checkpoint to begin with, as `--init` gives it
    model: ModelConfig | None = None  # the shape of that checkpoint
    train: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if self.model is not None:
            self.model.check_trains()
            check_balance_devices(self.train, self.model)
        check_microbatches(self.train, self.mesh)
        require(
            self.train.indexer == "sparse",
            f"train.indexer={self.train.indexer} trains no more than an indexer, which is "
            "tools/train.py's: leave it out",
        )

    @property
    def shape(self) -> ModelConfig:
        """The model, once the checkpoint has been read."""
        assert self.model is not None, "the program fills the model in before it trains"
        return self.model

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass."""
        return micro_batch_size(self.train, self.mesh)

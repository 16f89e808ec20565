"""A pre-training experiment: all groups, and the rules that span them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from dsjax.config.balance import check_balance_devices
from dsjax.config.data import DataConfig
from dsjax.config.mesh import MeshConfig
from dsjax.config.microbatches import check_microbatches, micro_batch_size
from dsjax.config.model import ModelConfig
from dsjax.config.rules import require
from dsjax.config.train import OptimConfig, PrecisionConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A pre-training experiment, the root that `dsjax.settings` reads by default.

    Attributes:
      tool: the command that takes it; every root names its own.
    """

    tool: ClassVar[str] = "tools/train.py"

    name: str
    init: str = ""  # path of a checkpoint of this shape to begin with; empty: random weights
    model: ModelConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        self.model.check_trains()
        length, limit = self.data.sequence_length, self.model.max_seq_len
        require(
            length <= limit,
            f"data.sequence_length={length} exceeds model.max_seq_len={limit}; lower the "
            "one or raise the other",
        )
        require(
            length > self.model.n_mtp + 1,
            f"data.sequence_length={length} leaves nothing to predict for "
            f"model.n_mtp={self.model.n_mtp}",
        )
        require(
            self.train.indexer == "sparse" or self.model.index_topk > 0,
            "train.indexer=warmup trains an indexer, and the model has none: set "
            "model.index_n_heads, model.index_head_dim and model.index_topk",
        )
        check_microbatches(self.train, self.mesh)
        check_balance_devices(self.train, self.model)

    @property
    def shape(self) -> ModelConfig:
        """The model, as the roots of post-training name it too."""
        return self.model

    @property
    def sequence_length(self) -> int:
        """Tokens per row."""
        return self.data.sequence_length

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass."""
        return micro_batch_size(self.train, self.mesh)

"""A language model and its eyes as one module, which trains as a whole or in parts."""

from __future__ import annotations

from dsjax.config import ModelConfig
from dsjax.config.vision import VisionConfig
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from dsjax.vision.alignment import Alignment
from dsjax.vision.eyes import Eyes


class Sighted(Transformer):
    """A language model whose parameters include what it sees and draws with, under `eyes`.

    Args:
      aligns: whether there is, as `alignment`, what only training has.
    """

    def __init__(
        self, config: ModelConfig, vision: VisionConfig, policy: Policy, *, aligns: bool = False
    ):
        super().__init__(config, policy)
        self.eyes = Eyes(vision, policy)
        if aligns:
            self.alignment = Alignment(config.dim, vision.tower.dim, policy)

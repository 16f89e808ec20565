"""A language model and its eyes as one module, which trains as a whole or in parts."""

from __future__ import annotations

from dsjax.config import ModelConfig
from dsjax.config.vision import VisionConfig
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes


class Sighted(Transformer):
    """A language model whose parameters include what it sees and draws with, under `eyes`."""

    def __init__(self, config: ModelConfig, vision: VisionConfig, policy: Policy):
        super().__init__(config, policy)
        self.eyes = Eyes(vision, policy)

"""Every hyper-parameter of an experiment, as frozen dataclasses that check themselves.

Field names follow DeepSeek's inference code (`q_lora_rank`, `n_routed_experts`). A group checks its
own fields when it is made; `Config` checks what spans groups. Nothing here imports jax, so that a
command can answer `--help` and refuse bad input at once. Reading files and `--set` overrides is in
`dsjax.settings`.
"""

from dsjax.config.data import DataConfig
from dsjax.config.mesh import MeshConfig
from dsjax.config.model import ModelConfig
from dsjax.config.pretraining import Config
from dsjax.config.train import OptimConfig, PrecisionConfig, TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PrecisionConfig",
    "TrainConfig",
]

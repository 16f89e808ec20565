"""The hyperparameters of an experiment: frozen dataclasses that check themselves.

  model.py        ModelConfig: the shape of a model
  vision.py       SiglipConfig, SamConfig, VqConfig, FlowConfig, VaeConfig, VisionConfig: what a
                  model sees and draws with
  data.py         DataConfig: the text and how it becomes sequences
  train.py        TrainConfig, OptimConfig, PrecisionConfig: run, optimizer, element types
  mesh.py         MeshConfig: devices along each mesh axis, and the pipeline schedule;
                  RolloutMeshConfig: the same devices for generation
  microbatches.py how a batch divides into forward passes; balance.py: experts into the groups of
                  the balance losses
  pretraining.py  Config: one pre-training experiment, the root that holds all groups
  posttraining.py PostTraining: what the roots of post-training share
  finetuning.py   FineTuning: supervised fine-tuning, the root of tools/sft.py
  reinforcement.py Reinforcement: learning from rewards, the root of tools/grpo.py
  distillation.py DistillConfig: what a student learns of a teacher, a group of FineTuning
  preference.py   Preference: DPO and reward models, the root of tools/prefer.py
  r1.py           R1: stages of the kinds above in order, the root of tools/r1.py
  roots.py        ROOTS: the roots that train one model, for commands that read any
  shapes.py       the ModelConfig of each published model
  recipes.py      experiments that differ only in model and learning rate
  rules.py        the checks that groups are written with

Field names follow DeepSeek's inference code (`q_lora_rank`, `n_routed_experts`). A group checks its
own fields when it is created; a root checks what spans groups. Another kind of experiment adds a
root of its own that reuses these groups; `dsjax.settings` reads files and `--set` for any root.

The root and the groups of pre-training are imported from here, the roots of post-training from
their own modules, so that a command reads only what it needs. Nothing here imports jax: a command
answers `--help` and refuses bad input at once.
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

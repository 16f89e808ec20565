"""The roots of all kinds of experiments that train one model, for commands that read any of them.

They have in common `name`, `shape`, `sequence_length`, `micro_batch_size` and the groups `train`,
`optim`, `precision` and `mesh`. Models that see are planned and not shown.
"""

from dsjax.config.finetuning import FineTuning
from dsjax.config.janus import Janus
from dsjax.config.preference import Preference
from dsjax.config.pretraining import Config
from dsjax.config.reinforcement import Reinforcement

Experiment = Config | FineTuning | Preference | Reinforcement
ROOTS: tuple[type[Experiment], ...] = (Config, FineTuning, Preference, Reinforcement)
Planned = Experiment | Janus
PLANNED: tuple[type[Planned], ...] = (*ROOTS, Janus)

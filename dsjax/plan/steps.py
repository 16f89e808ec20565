"""Which programs a training step of each kind of experiment runs, and one that decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from dsjax.config.finetuning import FineTuning
from dsjax.config.janus import Janus
from dsjax.config.preference import Preference
from dsjax.config.pretraining import Config
from dsjax.config.reinforcement import Reinforcement
from dsjax.config.roots import Planned
from dsjax.kernels.target import Target
from dsjax.plan import janus, posttraining, programs
from dsjax.plan.programs import Program

Build = Callable[[Any, Mesh | AbstractMesh, Target], Program]

_STEPS: Mapping[type[Planned], Mapping[str, Build]] = {
    Config: {"train": programs.train, "decode": programs.decode},
    FineTuning: {"train": posttraining.finetune, "decode": programs.decode},
    Preference: {"train": posttraining.prefer},
    Reinforcement: {
        "train": posttraining.update,
        "score": posttraining.score,
        "decode": posttraining.rollout,
    },
    Janus: {"train": janus.paint},
}


def of_training(config: Planned) -> list[str]:
    """Names the programs that a training step of an experiment runs, that which updates first."""
    return [step for step in _STEPS[type(config)] if step != "decode" or _answers(config)]


def _answers(config: Planned) -> bool:
    """Tells whether a training step lets the model answer."""
    return isinstance(config, Reinforcement)


def mesh_sizes(config: Planned, step: str) -> dict[str, int]:
    """Returns the devices along each axis of the mesh that a program runs on."""
    if step == "decode" and isinstance(config, Reinforcement):
        return config.rollout_mesh.sizes or config.mesh.sizes
    return config.mesh.sizes


def build(config: Planned, step: str, mesh: Mesh | AbstractMesh, target: Target) -> Program:
    """Builds a program: train, score or decode.

    Raises:
      ValueError: the experiment has no such program or does not fit the mesh.
    """
    known = _STEPS[type(config)]
    if step not in known:
        raise ValueError(
            f"{config.name} has no step {step}; of a {type(config).__name__} there are "
            f"{', '.join(known)}"
        )
    return known[step](config, mesh, target)

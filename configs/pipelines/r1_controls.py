"""What reasoning by rewards is worth: R1's pipeline up to there, and its two controls.

Both begin with the cold start, as reasoning does, and take as long: fine-tuning on more
demonstrations, and the same reinforcement learning by a reward that says nothing of an answer.

Command: python tools/r1.py configs/pipelines/r1_controls.py --seed 1
Hardware: 2 CPU cores, 4 GB of memory.
"""

import dataclasses
from pathlib import Path

from dsjax import settings
from dsjax.config.finetuning import FineTuning
from dsjax.config.r1 import R1, Stage
from dsjax.config.reinforcement import Reinforcement

R1_TINY = settings.read_python(Path(__file__).with_name("r1_tiny.py"), R1)
STAGES = {stage.name: stage for stage in R1_TINY.stages}
BASE, COLD_START, REASONING = (STAGES[name] for name in ("base", "cold_start", "reasoning"))


def continued(steps: int) -> Stage:
    """Fine-tuning for as many FLOPs, and as long, as reasoning takes."""
    config = COLD_START.config
    assert isinstance(config, FineTuning)
    train = dataclasses.replace(config.train, steps=steps)
    config = dataclasses.replace(config, name="continued", train=train)
    return Stage(name="continued", init="cold_start", config=config)


def by_chance() -> Stage:
    """Reasoning, its reward for the right answer replaced."""
    config = REASONING.config
    assert isinstance(config, Reinforcement)
    chance = f"{Path(__file__).parents[1] / 'rewards' / 'chance.py'}:chance"
    rl = dataclasses.replace(config.rl, rewards=(chance, "format"))
    config = dataclasses.replace(config, name="chance", rl=rl)
    return Stage(name="chance", init="cold_start", config=config)


config = dataclasses.replace(
    R1_TINY,
    name="r1_controls",
    stages=(BASE, COLD_START, REASONING, continued(850), by_chance()),
)

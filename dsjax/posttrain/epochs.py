"""The length of a run that is given in epochs."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable

from dsjax.config.posttraining import TuningConfig
from dsjax.train.hyperparameters import sequences_before


def over_epochs(
    train: TuningConfig, group: str, epochs: float, examples: int, say: Callable[[str], None]
) -> TuningConfig:
    """Returns `train` with the steps that `epochs` over so many examples take; says so if they
    replace steps that were asked for.

    Args:
      group: the config's group that has `epochs`, as in --set.
    """
    wanted = math.ceil(epochs * examples)

    def taken(steps: int) -> int:
        return sequences_before(dataclasses.replace(train, steps=steps), steps)

    # A batch ramp grows over the whole run, so how far it has come depends on the run's length.
    smallest = train.batch_size_start or train.batch_size
    lengths = range(1, wanted // smallest + 2)
    steps = lengths[bisect.bisect_left(lengths, wanted, key=taken)]
    if train.steps not in (steps, TuningConfig.steps):
        say(
            f"{group}.epochs={epochs:g} makes {steps:,} steps, and train.steps={train.steps} is "
            f"not read; {group}.epochs=0 leaves the length to it"
        )
    return dataclasses.replace(train, steps=steps)

"""The length of a run that is given in epochs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from dsjax.config.posttraining import TuningConfig


def over_epochs(
    train: TuningConfig, group: str, epochs: float, examples: int, say: Callable[[str], None]
) -> TuningConfig:
    """Returns `train` with the steps that `epochs` over so many examples take; says so if they
    replace steps that were asked for.

    Args:
      group: the config's group that has `epochs`, as in --set.
    """
    steps = max(math.ceil(epochs * examples / train.batch_size), 1)
    if train.steps not in (steps, TuningConfig.steps):
        say(
            f"{group}.epochs={epochs:g} makes {steps:,} steps, and train.steps={train.steps} is "
            f"not read; {group}.epochs=0 leaves the length to it"
        )
    return dataclasses.replace(train, steps=steps)

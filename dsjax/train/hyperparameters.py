"""The values that change over a run, as pure functions of the step: batch size, learning rate, loss
weights.

Paper: DeepSeek-V3 (arXiv:2412.19437), section 4.2. The paper gives its points in tokens; here they
are fractions of the run's tokens, so that one schedule fits a run of any length. Warm-up is in
steps, as in the paper. There is no jax here: the host computes the numbers and passes them to the
compiled step as arguments, so a change never causes another compilation.
"""

from __future__ import annotations

import bisect
import math
from typing import Protocol

from dsjax.config import OptimConfig, TrainConfig

RAMP_STAGES = 4  # batch sizes below the final one; few, since each is one more compilation


def batch_size(train: TrainConfig, step: int) -> int:
    """Returns the number of sequences of optimizer step `step` (counted from 0)."""
    for first_step, sequences in reversed(batch_stages(train)):
        if step >= first_step:
            return sequences
    raise AssertionError("the first stage starts at step 0")


def batch_stages(train: TrainConfig) -> list[tuple[int, int]]:
    """Returns (first step, sequences) of each stage of the batch ramp, ascending; a single stage if
    there is no ramp.

    The ramp has at most RAMP_STAGES stages of equal length and grows by whole micro-batches.
    """
    ramp_steps = round(train.batch_ramp_fraction * train.steps)
    if not train.batch_size_start or not ramp_steps:
        return [(0, train.batch_size)]
    first = train.batch_size_start // train.micro_batch_size
    last = train.batch_size // train.micro_batch_size
    n_stages = min(RAMP_STAGES, last - first, ramp_steps)
    stages = [
        (
            ramp_steps * i // n_stages,
            (first + (last - first) * i // n_stages) * train.micro_batch_size,
        )
        for i in range(n_stages)
    ]
    return [*stages, (ramp_steps if n_stages else 0, train.batch_size)]


def sequences_before(train: TrainConfig, step: int) -> int:
    """Returns the number of sequences that steps 0 to `step` - 1 consume."""
    stages = batch_stages(train)
    ends = [first_step for first_step, _ in stages[1:]] + [step]
    return sum(
        max(0, min(end, step) - first_step) * sequences
        for (first_step, sequences), end in zip(stages, ends, strict=True)
    )


def progress(train: TrainConfig, step: int) -> float:
    """Returns the fraction of the run's tokens seen before `step`, between 0 and 1."""
    return sequences_before(train, step) / sequences_before(train, train.steps)


def learning_rate(optim: OptimConfig, step: int, share: float) -> float:
    """Returns the learning rate of `step`, before which the fraction `share` of the run's tokens
    has been seen.
    """
    if step < optim.warmup_steps:
        # The first step trains too: rates are 1/n, 2/n, ... of the highest.
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.learning_rate
    if optim.schedule == "cosine":
        # Over the whole run; the warm-up takes the place of its first steps.
        return optim.learning_rate * _cosine(1.0, optim.final_ratio, share)
    if optim.schedule == "v3":
        return optim.learning_rate * _v3_ratio(optim, share)
    ratios = (1.0, *optim.decay_ratios)
    return optim.learning_rate * ratios[bisect.bisect_right(optim.decay_points, share)]


def _v3_ratio(optim: OptimConfig, share: float) -> float:
    """Returns V3's rate as a fraction of the highest: constant, then a cosine from the first point
    to the second, then two constant tails.
    """
    cosine_start, cosine_end, last_tail = optim.decay_points
    first_ratio, last_ratio = optim.decay_ratios
    if share < cosine_start:
        return 1.0
    if share >= last_tail:
        return last_ratio
    if share >= cosine_end:
        return first_ratio
    phase = (share - cosine_start) / (cosine_end - cosine_start)
    return _cosine(1.0, first_ratio, phase)


def _cosine(start: float, end: float, phase: float) -> float:
    """Returns the value at `phase`, between 0 and 1, of half a cosine from `start` to `end`."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * phase))


def mtp_weight(train: TrainConfig, share: float) -> float:
    """Returns the weight of the multi-token prediction loss, lambda of equation 25."""
    return train.mtp_weight if share < train.mtp_switch else train.mtp_weight_final


def bias_update_speed(train: TrainConfig, share: float) -> float:
    """Returns the step of the router bias, gamma of section 2.1.2; 0 in the last part of a run, and
    while an indexer trains alone.
    """
    if train.indexer == "warmup":
        return 0.0
    return train.bias_update_speed if share < train.bias_update_until else 0.0


class Scheduled(Protocol):
    """What schedules read of a config; any root with these groups will do."""

    @property
    def train(self) -> TrainConfig: ...
    @property
    def optim(self) -> OptimConfig: ...


def knobs(config: Scheduled, step: int) -> dict[str, float]:
    """Returns the knobs of next-token training at `step` (counted from 0)."""
    share = progress(config.train, step)
    return {
        "learning_rate": learning_rate(config.optim, step, share),
        "mtp_weight": mtp_weight(config.train, share),
        "bias_update_speed": bias_update_speed(config.train, share),
    }

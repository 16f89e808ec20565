"""Rewards to advantages, and the weight of each token in the loss; plain NumPy, on the host.

Papers: DeepSeekMath (arXiv:2402.03300), sections 4.1.2 and 4.1.3; R1 (arXiv:2501.12948), equation
3. Neither says which standard deviation it takes, nor how a group of equal rewards is treated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Scale = Literal["population", "sample", "none"]
Average = Literal["sequence", "token", "constant"]

SAMPLE_EPSILON = 1e-4  # added to the sample standard deviation, as TRL does


def outcome_advantages(rewards_QG: np.ndarray, scale: Scale = "population") -> np.ndarray:
    """Compares each output's reward with those of its group, float64 [Q, G].

    Args:
      rewards_QG: one row per question; NaN for an output that could not be judged, which is left
        out of its group's mean and gets advantage 0.
      scale: what the difference from the group's mean is divided by: the population's standard
        deviation (DeepSeekMath), the sample's plus 1e-4 (TRL), or nothing (Dr. GRPO, V3.2).

    A group of equal rewards gets exactly 0.
    """
    rewards_QG = np.asarray(rewards_QG, np.float64)
    advantages_QG = np.zeros_like(rewards_QG)
    for row, rewards_G in enumerate(rewards_QG):
        judged_G = ~np.isnan(rewards_G)
        advantages_QG[row, judged_G] = _standardized(rewards_G[judged_G], scale)
    return advantages_QG


def process_advantages(
    rewards: Sequence[Sequence[float]],
    ends: Sequence[Sequence[int]],
    lengths: Sequence[int],
    scale: Scale = "population",
) -> list[np.ndarray]:
    """Turns the rewards of reasoning steps into an advantage per token (DeepSeekMath 4.1.3).

    The step rewards of a whole group are standardized together. A token's advantage is the sum over
    the steps that end at it or after it.

    Args:
      rewards: of each output of the group, one per step.
      ends: of each output, the place of each step's last token, counted from 0.
      lengths: tokens of each output.

    Returns:
      of each output, float64 [tokens].

    Raises:
      ValueError: an output has more rewards than steps, or a step ends outside its output.
    """
    for number, (own, places, length) in enumerate(zip(rewards, ends, lengths, strict=True)):
        if len(own) != len(places) or any(not 0 <= place < length for place in places):
            raise ValueError(
                f"output {number} of {length} tokens has {len(own)} step rewards and steps that "
                f"end at {list(places)}; give one reward per step, and places from 0 to "
                f"{length - 1}"
            )
    flat = np.asarray([reward for own in rewards for reward in own], np.float64)
    standardized = iter(_standardized(flat, scale))
    result = []
    for places, length in zip(ends, lengths, strict=True):
        advantages = np.zeros(length)
        for place in places:
            advantages[: place + 1] += next(standardized)
        result.append(advantages)
    return result


def _standardized(rewards: np.ndarray, scale: Scale) -> np.ndarray:
    # Compared, not computed: the mean of equal numbers may differ from them in the last bit.
    if not len(rewards) or rewards.min() == rewards.max():
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if scale == "none":
        return centred
    if scale == "sample":
        return centred / (rewards.std(ddof=1) + SAMPLE_EPSILON)
    return centred / rewards.std()


def token_weights(
    lengths: Sequence[int], average: Average = "sequence", longest: int | None = None
) -> np.ndarray:
    """Returns the weight that every token of an output has in the loss, float64 [outputs].

    The weights belong to all outputs of one optimizer step together: a mean over each micro-batch
    and then over micro-batches would be another loss.

    Args:
      lengths: tokens of each output, its end token included.
      average: "sequence", the mean over an output's tokens and then over outputs (DeepSeekMath);
        "token", the mean over all tokens (DAPO, V3.2); "constant", the sum over tokens divided by
        outputs times `longest` (Dr. GRPO).
      longest: the most tokens that an output may have; "constant" needs it.
    """
    counts = np.asarray(lengths, np.float64)
    if average == "sequence":
        return 1.0 / (len(counts) * counts)
    if average == "token":
        return np.full(len(counts), 1.0 / max(counts.sum(), 1.0))
    if average != "constant" or longest is None:
        raise ValueError(
            f"average={average!r} with longest={longest} is none of sequence, token, and constant "
            "with its longest"
        )
    return np.full(len(counts), 1.0 / (max(len(counts), 1) * longest))

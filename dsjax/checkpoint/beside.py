"""Compares what a folder has beside the language model with what its config.json describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsjax.checkpoint import families
from dsjax.checkpoint.families.sight import Part
from dsjax.checkpoint.hf_config import vision_of
from dsjax.checkpoint.tensor_files import TensorInfo
from dsjax.config.vision import VisionConfig

_PLAIN = tuple(np.dtype(each) for each in (np.float32, np.float16, ml_dtypes.bfloat16))


class Beside(NamedTuple):
    """What is beside the language model.

    Attributes:
      vision: its shape, without what the files lack and nothing reads.
      parts: the tensors that are there.
      missing, wrong: messages, of tensors that are not there or of another shape or dtype.
    """

    vision: VisionConfig
    parts: list[Part]
    missing: list[str]
    wrong: list[str]

    @property
    def names(self) -> set[str]:
        return {part.name for part in self.parts}


def beside(
    config: Mapping[str, Any], family: str, found: Mapping[str, TensorInfo]
) -> Beside | None:
    """Looks for the tensors beside the language model; None if the family has none.

    Args:
      found: the tensors of the folder.
    """
    vision, sight = vision_of(config), families.find(family).sight
    if vision is None or sight is None:
        return None
    unread = {part.path[-2:] for part in sight.parts(vision) if part.name in found}
    # A folder may leave out what no model reads: a pooling head, idle norms, counts of codes.
    if vision.tower.pool and not any("pool" in path for path in unread):
        vision = dataclasses.replace(vision, tower=dataclasses.replace(vision.tower, pool=False))
    if vision.idle_norms and not any("high_norm" in path for path in unread):
        vision = dataclasses.replace(vision, idle_norms=False)
    if vision.vq and vision.vq.usage and not any(path[-1] == "usage" for path in unread):
        vision = dataclasses.replace(vision, vq=dataclasses.replace(vision.vq, usage=0))
    result = Beside(vision, list(sight.parts(vision)), [], [])
    for part in result.parts:
        info = found.get(part.name)
        if info is None:
            result.missing.append(f"missing {part.name} {list(part.shape)}")
        elif info.shape != part.shape or info.dtype not in _PLAIN:
            result.wrong.append(
                f"{part.name} is {info.dtype}{list(info.shape)}, config.json gives "
                f"{list(part.shape)} of float32, bfloat16 or float16"
            )
    return result

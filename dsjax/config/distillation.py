"""Distillation: what a student learns of a teacher."""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsjax.config.rules import require, require_not_negative, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a student is trained; R1's six were trained on samples, without logits."""

    # samples: on what the files hold, as in any fine-tuning. logits: on the teacher's
    # distribution over the next token, at every token that is trained (forward KL). on_policy: on
    # the student's own answers to the prompts of the files (reverse KL).
    kind: Literal["samples", "logits", "on_policy"] = "samples"
    teacher: str = ""  # path of the teacher's checkpoint, of the student's vocabulary
    temperature: float = 1.0  # of both distributions; the loss is multiplied by its square
    # Of logits: how many of the teacher's likeliest tokens are written to disk, in a pass before
    # training, after which the teacher is not needed. 0: the teacher stays beside the student and
    # every token of the vocabulary counts.
    top_k: int = 0
    max_new_tokens: int = 256  # of on_policy: the longest answer

    def __post_init__(self) -> None:
        require_positive("distill", self, "temperature", "max_new_tokens")
        require_not_negative("distill", self, "top_k")
        require(
            self.kind == "samples" or bool(self.teacher),
            f"distill.kind={self.kind} needs a teacher; name its checkpoint with distill.teacher",
        )
        require(
            self.kind != "samples" or not self.teacher,
            f"distill.teacher={self.teacher} is not used by distill.kind=samples; draw samples "
            "from it with tools/sample.py and name them in sft.files, or set distill.kind=logits",
        )
        require(
            self.kind == "logits" or not self.top_k,
            f"distill.top_k={self.top_k} goes with distill.kind=logits; leave it out",
        )

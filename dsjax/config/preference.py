"""Preference training: DPO and reward models."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from dsjax.config.posttraining import PostTraining
from dsjax.config.rules import require, require_not_negative, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """What is compared, and how."""

    # dpo: a policy from pairs of answers. bradley_terry: a reward model from pairs. pointwise: a
    # reward model from single answers, each labelled good or bad.
    kind: Literal["dpo", "bradley_terry", "pointwise"] = "dpo"
    beta: float = 0.1  # of DPO: how strongly the policy is held to the reference
    # Globs of .jsonl(.gz|.zst) or .parquet: {"prompt", "chosen", "rejected"}, or for pointwise
    # {"prompt", "completion", "label"}.
    files: str = ""
    heldout_files: str = ""  # globs of held-out examples; empty: heldout_fraction of them
    heldout_fraction: float = 0.05  # 0: none, and no held-out accuracy
    sequence_length: int = 2048  # tokens of a prompt with one answer; longer examples are dropped
    epochs: float = 0.0  # passes over the examples; 0: train.steps decides
    seed: int = 0  # of the order

    def __post_init__(self) -> None:
        require_positive("preference", self, "beta")
        require_not_negative("preference", self, "epochs", "seed")
        require(
            self.sequence_length >= 2,
            f"preference.sequence_length={self.sequence_length} must be at least 2",
        )
        require(
            0 <= self.heldout_fraction < 1,
            f"preference.heldout_fraction={self.heldout_fraction} must lie in [0, 1)",
        )

    @property
    def rows_per_example(self) -> int:
        """Sequences that an example takes: a pair's two answers, or the one that is labelled."""
        return 1 if self.kind == "pointwise" else 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(PostTraining):
    """A preference experiment. A batch counts examples: `train.batch_size` pairs or labelled
    answers.
    """

    tool: ClassVar[str] = "tools/prefer.py"

    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.train.batch_size_start,
            f"train.batch_size_start={self.train.batch_size_start}: preference training has no "
            "batch ramp; leave it out",
        )
        if self.model is None:
            return
        length, limit = self.preference.sequence_length, self.model.max_seq_len
        require(
            length <= limit,
            f"preference.sequence_length={length} exceeds the checkpoint's max_seq_len={limit}; "
            "lower it",
        )

    @property
    def sequence_length(self) -> int:
        """Tokens per row: of a prompt with one answer."""
        return self.preference.sequence_length

"""Fine-tuning on conversations: supervised, expert-specialized (ESFT), taught by a teacher."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from dsjax.config.distillation import DistillConfig
from dsjax.config.posttraining import PostTraining
from dsjax.config.rules import require, require_not_negative, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """The conversations and how they become rows."""

    # Globs of .jsonl(.gz|.zst) or .parquet: {"messages": [...]} or {"prompt", "completion"}.
    files: str = ""
    heldout_files: str = ""  # globs of held-out conversations; empty: heldout_fraction of them
    heldout_fraction: float = 0.02  # 0: none, and no held-out loss
    sequence_length: int = 4096  # tokens per row, into which conversations are packed
    # what happens to a conversation that is longer than a row
    longer: Literal["drop", "truncate"] = "drop"
    # the conversations' format; checkpoint: its template, else what its control tokens imply
    format: Literal["checkpoint", "V3", "R1", "V3.1"] = "checkpoint"
    # folder of a tokenizer and a chat template to use instead of the checkpoint's
    tokenizer: str = ""
    epochs: float = 0.0  # passes over the conversations; 0: train.steps decides
    mtp: Literal["on", "off"] = "off"  # whether the MTP modules are trained too
    seed: int = 0  # of the order

    def __post_init__(self) -> None:
        require(
            self.sequence_length >= 2,
            f"sft.sequence_length={self.sequence_length} must be at least 2",
        )
        require_not_negative("sft", self, "epochs", "seed")
        require(
            0 <= self.heldout_fraction < 1,
            f"sft.heldout_fraction={self.heldout_fraction} must lie in [0, 1)",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EsftConfig:
    """Expert-specialized fine-tuning (arXiv:2407.01906): which experts train, and no other."""

    # off: everything trains. gate: by average gate score. token: by share of selections.
    score: Literal["off", "gate", "token"] = "off"
    threshold: float = 0.1  # of the scores' sum that the chosen experts reach; the paper: .1, .2
    sample_rows: int = 32  # rows of conversations that the scores are averaged over

    def __post_init__(self) -> None:
        require_positive("esft", self, "sample_rows")
        require(
            0 < self.threshold <= 1,
            f"esft.threshold={self.threshold} must lie in (0, 1]",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning(PostTraining):
    """A fine-tuning experiment."""

    tool: ClassVar[str] = "tools/sft.py"

    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    esft: EsftConfig = dataclasses.field(default_factory=EsftConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.distill.kind == "samples" or self.sft.mtp == "off",
            f"sft.mtp=on: distill.kind={self.distill.kind} has no loss for MTP modules; leave it "
            "out",
        )
        require(
            self.distill.kind != "on_policy" or not self.sft.epochs,
            f"sft.epochs={self.sft.epochs} counts passes over what files hold, and "
            "distill.kind=on_policy trains on the student's answers; set sft.epochs=0, and the "
            "number of steps with train.steps",
        )
        if self.model is None:
            return
        length, limit, n_mtp = self.sft.sequence_length, self.model.max_seq_len, self.model.n_mtp
        require(
            length <= limit,
            f"sft.sequence_length={length} exceeds the checkpoint's max_seq_len={limit}; lower it, "
            "or, if the model can do more, import it with --override max_position_embeddings=...",
        )
        if self.sft.mtp == "on":
            require(n_mtp > 0, "sft.mtp=on, and the checkpoint has no MTP modules; leave it out")
            require(
                length > n_mtp + 1,
                f"sft.sequence_length={length} leaves nothing to predict for {n_mtp} MTP modules",
            )
        if self.esft.score != "off":
            require(
                self.model.n_moe_layers > 0,
                f"esft.score={self.esft.score} chooses experts, and the checkpoint has none; set "
                "esft.score=off",
            )

    @property
    def sequence_length(self) -> int:
        """Tokens per row."""
        return self.sft.sequence_length

"""Where the text comes from."""

from __future__ import annotations

import dataclasses

from dsjax.config.rules import require, require_fraction, require_not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes sequences."""

    # glob of text, .jsonl(.gz|.zst), .parquet; empty: the standard library's source on this machine
    files: str = ""
    heldout_files: str = ""  # glob of held-out text; empty: heldout_fraction of the documents
    heldout_fraction: float = 0.05
    text_field: str = "text"  # the column of JSON lines and parquet that holds the text
    # path of a tokenizer.json; empty: byte-level BPE trained on the corpus, cached with it
    tokenizer: str = ""
    sequence_length: int = 4096  # tokens a sequence
    fim_rate: float = 0.1  # share of documents rearranged as prefix-suffix-middle (V3 section 4.1)
    # attention stays inside a document; V3 pre-training leaves this off
    isolate_documents: bool = False
    cache_dir: str = ""  # token cache; empty: $XDG_CACHE_HOME/dsjax or ~/.cache/dsjax
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self.sequence_length >= 2,
            f"data.sequence_length={self.sequence_length} must be at least 2",
        )
        require_not_negative("data", self, "seed")
        require_fraction("data", self, "fim_rate")
        require(
            0 < self.heldout_fraction < 1,
            f"data.heldout_fraction={self.heldout_fraction} must lie strictly between 0 and 1",
        )

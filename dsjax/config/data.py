"""The text of a run."""

from __future__ import annotations

import dataclasses

from dsjax.config.rules import require, require_fraction, require_not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of the text and how it becomes sequences."""

    # Glob of text, .jsonl(.gz|.zst) or .parquet. Empty: the source code of this machine's Python
    # standard library, which is there without a download.
    files: str = ""
    heldout_files: str = ""  # glob of held-out text; empty: heldout_fraction of the documents
    heldout_fraction: float = 0.05
    text_field: str = "text"  # column of JSON lines and parquet files that holds the text
    # path of a tokenizer.json; empty: a byte-level BPE trained on the corpus and cached with it
    tokenizer: str = ""
    sequence_length: int = 4096  # tokens per sequence
    # fraction of documents rearranged as prefix-suffix-middle (V3 section 4.1)
    fim_rate: float = 0.1
    # restricts attention to one document; off in V3's pre-training
    isolate_documents: bool = False
    cache_dir: str = ""  # of tokens; empty: $XDG_CACHE_HOME/dsjax or ~/.cache/dsjax
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

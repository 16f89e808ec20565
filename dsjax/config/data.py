"""The text of a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from dsjax.config.rules import require, require_fraction, require_not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of the text and how it becomes sequences."""

    # Globs or folders, separated by commas, of text, .jsonl, .csv, .parquet or .arrow, also .gz,
    # .bz2, .xz or .zst. Empty: the source code of this machine's Python standard library, which is
    # there without a download.
    files: str = ""
    # shares of the training rows, one for each glob of `files`, in any unit; empty: every document
    # once per epoch
    weights: tuple[float, ...] = ()
    heldout_files: str = ""  # glob of held-out text; empty: heldout_fraction of the documents
    heldout_fraction: float = 0.05
    # field of JSON lines or column that holds the text: nested ones with dots (meta.text), several
    # with commas (title,body)
    text_field: str = "text"
    # what happens on a record or file that cannot be read: the run stops, or goes on without it and
    # counts it
    on_bad_record: Literal["stop", "skip"] = "stop"
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
        require(
            all(0 < weight < math.inf for weight in self.weights),
            f"data.weights={','.join(map(str, self.weights))} must all be above 0; leave the files "
            "of a part that counts nothing out of data.files",
        )
        require(
            not self.weights or bool(self.files),
            "data.weights are of the globs of data.files, which is empty; set both or none",
        )
        require_fraction("data", self, "fim_rate")
        require(
            0 < self.heldout_fraction < 1,
            f"data.heldout_fraction={self.heldout_fraction} must lie strictly between 0 and 1",
        )

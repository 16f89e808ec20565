"""Tokenizes the result into the cache that training reads, so that a run begins at once."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsjax.data.corpus import prepare_corpus
from dsjax.text import tokenizer


def patterns(out: Path) -> tuple[str, str]:
    """Returns the globs of the train and held-out files, for data.files and data.heldout_files."""
    folder = glob.escape(os.path.join(out, "text"))
    return f"{folder}/train-*.parquet", f"{folder}/heldout-*.parquet"


def tokenize(
    out: Path, path: str, cache_dir: str, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Tokenizes train and held-out text, unless the cache has them.

    Args:
      path: of a tokenizer.json.
      cache_dir: as data.cache_dir.

    Returns:
      per side its tokens, and the bytes of text per token.

    Raises:
      ValueError: the tokenizer cannot be read, or a side has no text.
    """
    files, heldout_files = patterns(out)
    corpus = prepare_corpus(
        files=files,
        heldout_files=heldout_files,
        tokenizer_path=path,
        vocab_size=tokenizer.load_tokenizer(path).vocab_size,
        cache_dir=cache_dir,
        progress=progress,
    )
    return {
        name: {
            "tokens": side.total_tokens,
            "bytes_per_token": round(side.total_bytes / side.total_tokens, 3),
        }
        for name, side in (("train", corpus.train), ("heldout", corpus.heldout))
    }

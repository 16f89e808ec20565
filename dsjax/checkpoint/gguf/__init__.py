"""GGUF, the file format of llama.cpp and ollama: written from any checkpoint, and read back.

The container and the quantized types come from the package `gguf` (extra `gguf`).

architecture.py says which of llama.cpp's architectures computes a model, refuses what llama.cpp
computes otherwise, and relates its keys to ModelConfig. layout.py relates a file's tensors to
published ones, both ways. types.py chooses a type per tensor. vocabulary.py relates a tokenizer to
its keys, splits.py names the pre-tokenizers that llama.cpp knows.

exporting.py writes a file in bounded memory, quantizer.py lets llama.cpp's own program make the
types that the package does not quantize. container.py reads headers strictly, reading.py presents a
file as a Hugging Face folder that can be loaded and imported, summary.py describes one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENDING = ".gguf"


def is_gguf(path: Path) -> bool:
    """Tells by its name or its first bytes whether a path is a GGUF file, whole or not."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ENDING or file.read(4) == b"GGUF"


def refuse_overrides(path: Path, overrides: Mapping[str, Any] | None) -> None:
    """Raises ValueError if fields of a config.json are to be read in another way."""
    if overrides:
        raise ValueError(
            f"--override {', '.join(overrides)}: {path} is a GGUF file, whose keys describe the "
            "model, and has no config.json; leave it out"
        )


def require_package() -> None:
    """Raises ValueError if the package `gguf` is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "GGUF files need the package gguf, which is not installed; pip install -e '.[gguf]' or "
            "pip install gguf"
        )

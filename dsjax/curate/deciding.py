"""Stage `rules`: the first rule that each document fails, and how each measure is distributed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dsjax.curate import rules, shards
from dsjax.curate.tagging import SIGNALS

VERSION = 1
PASSED = ""  # the verdict on a document that no rule removes
SCHEMA = pa.schema([("verdict", pa.string())])
BINS = 40


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard of stage `tag`, and what to hold it against."""

    path: Path
    kinds: Mapping[str, str]  # of sources, by name
    languages: tuple[str, ...]
    language_score: float
    table: rules.Table


def decide(job: Job, folder: Path, number: int) -> dict[str, Any]:
    """Writes a verdict per document: `PASSED`, "language", or the signal of the rule it fails.

    Returns:
      per set of rules, counts in the bins of `edges` for each signal; and per source, how many
      documents are in each language.
    """
    del number
    columns = shards.arrays(job.path, ("source", "language", "score", *SIGNALS))
    verdicts = np.full(len(columns["source"]), "language", object)
    distributions: dict[str, dict[str, list[int]]] = {}
    for kind, language in job.table:
        chosen = _members(columns, kind, language, job)
        if not chosen.any():
            continue
        measured = {name: columns[name][chosen] for name in SIGNALS}
        if kind == "code" or language in job.languages:
            verdicts[chosen] = _verdicts(measured, job.table[kind, language])
        distributions[f"{kind}.{language}"] = {
            rule.signal: _counts(rule.signal, measured[rule.signal])
            for rule in job.table[kind, language]
        }
    with shards.Writer(folder / job.path.name, SCHEMA) as writer:
        for verdict in verdicts:
            writer.add({"verdict": verdict})
    spoken: dict[str, Counter[str]] = {}
    for source, language in zip(columns["source"], columns["language"], strict=True):
        spoken.setdefault(source, Counter())[language] += 1
    return {"distributions": distributions, "languages": spoken}


def edges(signal: str) -> np.ndarray:
    """Returns the borders of the bins in which a signal is counted: float64 [BINS + 1]."""
    if signal in _COUNTED:
        return np.concatenate([[0.0], np.geomspace(1, 1e6, BINS)])
    return np.linspace(0, 1, BINS + 1)


# Signals that are numbers or lengths rather than shares.
_COUNTED = {
    "words", "mean_word", "stop_words", "sentences", "curly_brackets", "lorem_ipsum",
    "mean_line", "longest_line", "data_bytes",
}  # fmt: skip


def _members(columns: Mapping[str, np.ndarray], kind: str, language: str, job: Job) -> np.ndarray:
    of_kind = [name for name, other in job.kinds.items() if other == kind]
    chosen = np.isin(columns["source"].astype(str), of_kind)
    if kind != "code":
        chosen &= columns["language"] == language
        chosen &= columns["score"] >= job.language_score
    return chosen


def _verdicts(measured: Mapping[str, np.ndarray], chosen: Sequence[rules.Rule]) -> np.ndarray:
    names = np.array([*(rule.signal for rule in chosen), PASSED], object)
    return names[rules.first_failures(measured, chosen)]


def _counts(signal: str, values: np.ndarray) -> list[int]:
    borders = edges(signal)
    inside = np.clip(values[~np.isnan(values)], borders[0], borders[-1])
    return np.histogram(inside, borders)[0].tolist()

"""Stage `text`: writes what is kept, divided into train and held-out, and takes samples."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dsjax.curate import passages, personal, renaming, sampling, shards
from dsjax.curate.deciding import PASSED
from dsjax.curate.deduplicating import EXACT, NEAR

VERSION = 2
KEPT = "kept"
REPEATED = "repeated_passages"  # nothing else is left
RENAMED = "#renamed"  # ends the id of a document with renamed variables
SIDES = ("train", "heldout")
SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("text", pa.string())])


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard: its documents, and the verdicts on them."""

    documents: Path
    verdicts: Path  # of what came before
    duplicates: Path | None  # verdicts.npy of stage `duplicates`
    start: int  # the number of the shard's first document in it
    passages: int  # bytes of a repeated passage that is cut out; 0 leaves them
    personal: bool  # whether to replace what identifies
    rename: float  # share of Python files with renamed variables, of the train text
    heldout_fraction: float
    samples: int
    seed: int


def write(job: Job, folder: Path, number: int) -> dict[str, Any]:
    """Writes SIDE-SOURCE-NUMBER.parquet for each side of the split that gets a document.

    Returns:
      documents and bytes per source and verdict, of the kept per side too, samples per source and
      verdict, and in how many documents variables were renamed.
    """
    findings = sampling.Findings(job.samples, job.seed)
    sides: dict[str, dict[str, list[int]]] = {}
    renamed = 0
    with contextlib.ExitStack() as stack:
        writers: dict[str, shards.Writer] = {}
        for row, verdict in _judged(job):
            place = sampling.position(row["id"], job.seed)
            side = SIDES[place < job.heldout_fraction * sampling.WHOLE]
            if job.personal and verdict == KEPT:
                row["text"] = personal.replace(row["text"])
            if verdict == KEPT and side == "train" and _is_chosen(row, job):
                row, before = _renamed(row, job), row
                renamed += row is not before
            size = len(row["text"].encode())
            findings.add(row, verdict, size)
            if verdict != KEPT:
                continue
            sampling.add(sides, row["source"], side, size)
            if side not in writers:
                path = folder / f"{side}-{row['source']}-{number:05}.parquet"
                writers[side] = stack.enter_context(shards.Writer(path, SCHEMA))
            writers[side].add({name: row[name] for name in SCHEMA.names}, size)
    samples = findings.samples()
    return {"counts": findings.counts, "sides": sides, "samples": samples, "renamed": renamed}


def _is_chosen(row: shards.Row, job: Job) -> bool:
    """Tells whether the variables of a document are to be renamed."""
    if not job.rename or not row["path"].endswith(".py"):
        return False
    return sampling.position(f"{row['id']}{RENAMED}", job.seed) < job.rename * sampling.WHOLE


def _renamed(row: shards.Row, job: Job) -> shards.Row:
    """Returns the document with other variables and a mark in its id, or as it is."""
    text = renaming.rename(row["text"], sampling.position(row["id"], job.seed))
    if text == row["text"]:
        return row
    return row | {"id": row["id"] + RENAMED, "text": text}


def _judged(job: Job) -> Iterator[tuple[shards.Row, str]]:
    """Yields the documents with their verdicts, without repeated passages in what is kept."""
    verdicts = _verdicts(job)
    rows = zip(shards.rows(job.documents), verdicts, strict=True)
    if not job.passages:
        yield from rows
        return
    texts = shards.rows(job.documents, ["text"])
    kept = [row["text"] for row, verdict in zip(texts, verdicts, strict=True) if verdict == KEPT]
    cut = iter(passages.without_repeats(kept, job.passages))
    for row, verdict in rows:
        if verdict != KEPT:
            yield row, verdict
        elif rest := next(cut):
            yield row | {"text": rest}, KEPT
        else:
            yield row, REPEATED


def _verdicts(job: Job) -> list[str]:
    """Returns KEPT or what removes a document, for each of the shard."""
    verdicts = [row["verdict"] for row in shards.rows(job.verdicts)]
    copies = np.zeros(len(verdicts), np.int8)
    if job.duplicates is not None:
        copies = np.load(job.duplicates, mmap_mode="r")[job.start : job.start + len(verdicts)]
    names = (KEPT, EXACT, NEAR)
    return [
        names[copy] if verdict == PASSED else verdict
        for verdict, copy in zip(verdicts, copies.tolist(), strict=True)
    ]

"""Stages `buckets`, `shingles` and `duplicates`, of which the first and the last see all documents.

  buckets      per document what it is an exact copy of; of the rest, which share a band
  shingles     the sets of those documents, shard by shard
  duplicates   compares them and writes who is removed in favour of whom

Only documents that pass the rules take part. Of two, the one from the earlier source stays, then
the longer one. Per document, 300 bytes are in memory; signatures and shingles are mapped from
disk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dsjax.curate import duplicates, shards
from dsjax.curate.deciding import PASSED
from dsjax.curate.duplicates import NONE
from dsjax.curate.shingles import VALUES, bands, jaccard, rows_per_band, shingle_set
from dsjax.files import replacing

VERSION = 2
EXACT, NEAR = "exact_duplicate", "near_duplicate"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("verdict", pa.string()),
        ("keeper", pa.string()),
        ("jaccard", pa.float64()),
    ]
)
_OPEN_SHARDS = 64


@dataclasses.dataclass(frozen=True)
class Gathering:
    """The job of stage `buckets`: tags and verdicts of all shards."""

    tags: tuple[Path, ...]
    verdicts: tuple[Path, ...]
    sources: tuple[str, ...]  # earlier ones are preferred
    threshold: float | None  # of near duplicates; None leaves them


@dataclasses.dataclass(frozen=True)
class Cutting:
    """A job of stage `shingles`: a shard of documents, the first of which has number `start`."""

    path: Path
    buckets: Path
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class Comparing:
    """The job of stage `duplicates`."""

    tags: tuple[Path, ...]
    starts: tuple[int, ...]  # the number of each shard's first document
    buckets: Path
    shingles: Path
    threshold: float | None


def gather(job: Gathering, folder: Path, number: int) -> dict[str, Any]:
    """Writes exact.npy, int64 [documents], and of the candidates for near duplicates, in their
    order: candidates.npy (their numbers), buckets.npy and signatures.npy.
    """
    del number
    parts = [_arrays(tags, verdicts) for tags, verdicts in zip(job.tags, job.verdicts, strict=True)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = _order(joined, job.sources)
    keepers = duplicates.exact(joined["digest"], order)
    _save(folder / "exact.npy", keepers)
    candidates = np.zeros(0, np.int64)
    if job.threshold is not None:
        rest = order[keepers[order] == NONE]
        shared = duplicates.buckets(_bands(job.tags, job.threshold)[rest])
        chosen = (shared != NONE).any(axis=1)
        candidates, shared = rest[chosen], shared[chosen]
        _save(folder / "buckets.npy", shared)
        _save_signatures(folder / "signatures.npy", job.tags, candidates)
    _save(folder / "candidates.npy", candidates)
    return {"documents": len(keepers), "candidates": len(candidates)}


def cut(job: Cutting, folder: Path, number: int) -> dict[str, Any]:
    """Writes the shingles of a shard's candidates: NUMBER.npy, one set after the other, and
    NUMBER.ends.npy, int64 [count + 1]; other documents have an empty set.
    """
    wanted = np.zeros(job.count, bool)
    candidates = np.load(job.buckets / "candidates.npy")
    here = candidates[(candidates >= job.start) & (candidates < job.start + job.count)]
    wanted[here - job.start] = True
    sets = [np.zeros(0, np.uint32)] * job.count
    if wanted.any():
        for place, row in enumerate(shards.rows(job.path, ["text"])):
            if wanted[place]:
                sets[place] = np.unique(shingle_set(row["text"]).astype(np.uint32))
    ends = np.concatenate([[0], np.cumsum([len(members) for members in sets], dtype=np.int64)])
    _save(folder / f"{number:05}.npy", np.concatenate([np.zeros(0, np.uint32), *sets]))
    _save(folder / f"{number:05}.ends.npy", ends)
    return {}


def compare(job: Comparing, folder: Path, number: int) -> dict[str, Any]:
    """Writes verdicts.npy, int8 [documents] (0 stays, 1 exact, 2 near duplicate), and
    duplicates.parquet, with what each removed document is a duplicate of.

    Returns:
      how many documents are removed, and how many groups there are of each size.
    """
    del number
    keepers = np.load(job.buckets / "exact.npy")
    found = {int(n): (EXACT, int(keepers[n]), 1.0) for n in np.flatnonzero(keepers != NONE)}
    candidates = np.load(job.buckets / "candidates.npy")
    if len(candidates):
        sets = _Sets(job.shingles, job.starts)
        removed = duplicates.near(
            np.load(job.buckets / "buckets.npy", mmap_mode="r"),
            np.load(job.buckets / "signatures.npy", mmap_mode="r"),
            job.threshold or 1.0,
            lambda one, other: jaccard(sets[int(candidates[one])], sets[int(candidates[other])]),
        )
        for one, other, similarity in removed:
            found[int(candidates[one])] = (NEAR, int(candidates[other]), similarity)
    verdicts = np.zeros(len(keepers), np.int8)
    for document, (verdict, _, _) in found.items():
        verdicts[document] = (EXACT, NEAR).index(verdict) + 1
    _save(folder / "verdicts.npy", verdicts)
    names = _names(job.tags, {n for one, (_, other, _) in found.items() for n in (one, other)})
    with shards.Writer(folder / "duplicates.parquet", SCHEMA) as writer:
        for document, (verdict, keeper, similarity) in sorted(found.items()):
            row = {"id": names[document], "verdict": verdict, "keeper": names[keeper]}
            writer.add(row | {"jaccard": similarity})
    sizes = Counter(Counter(keeper for _, keeper, _ in found.values()).values())
    return {
        "exact": int((verdicts == 1).sum()),
        "near": int((verdicts == 2).sum()),
        "groups": {str(size + 1): count for size, count in sorted(sizes.items())},
    }


class _Sets:
    """Shingles by number of document, mapped from the files of `cut`."""

    def __init__(self, folder: Path, starts: Sequence[int]) -> None:
        self._folder = folder
        self._starts = np.asarray(starts)
        self._open = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._map)

    def __getitem__(self, document: int) -> np.ndarray:
        shard = int(np.searchsorted(self._starts, document, side="right")) - 1
        sets, ends = self._open(shard)
        place = document - self._starts[shard]
        return sets[ends[place] : ends[place + 1]]

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        path = self._folder / f"{shard:05}.npy"
        return np.load(path, mmap_mode="r"), np.load(path.with_suffix(".ends.npy"))


def _arrays(tags: Path, verdicts: Path) -> dict[str, np.ndarray]:
    columns = shards.arrays(tags, ("source", "bytes", "digest"))
    passed = shards.arrays(verdicts, ["verdict"])["verdict"] == PASSED
    digests = np.frombuffer(b"".join(columns["digest"]), "V16")
    return {
        "source": columns["source"].astype("U"),
        "bytes": columns["bytes"],
        "digest": digests,
        "passed": np.asarray(passed, bool),
    }


def _order(joined: Mapping[str, np.ndarray], sources: Sequence[str]) -> np.ndarray:
    """Returns the numbers of the documents that pass, those that are to stay first."""
    rank = np.zeros(len(joined["source"]), np.int64)
    for place, name in enumerate(sources):
        rank[joined["source"] == name] = place
    passed = np.flatnonzero(joined["passed"])
    # By source, then length; equal ones as they were read.
    return passed[np.lexsort((-joined["bytes"][passed], rank[passed]))]


def _signatures(path: Path) -> np.ndarray:
    column = shards.arrays(path, ["signature"])["signature"]
    return np.frombuffer(b"".join(column), "<u4").reshape(-1, VALUES)


def _bands(tags: Sequence[Path], threshold: float) -> np.ndarray:
    rows = rows_per_band(threshold)
    return np.concatenate([bands(_signatures(path), rows) for path in tags])


def _save_signatures(path: Path, tags: Sequence[Path], candidates: np.ndarray) -> None:
    """Writes the signatures of the candidates in their order, a shard in memory at a time."""
    place_of = {int(document): place for place, document in enumerate(candidates)}
    with replacing(path) as file:
        shape = (len(candidates), VALUES)
        header = {"descr": "<u4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        begin, start = file.tell(), 0
        for tag in tags:
            found = _signatures(tag)
            for document, signature in enumerate(found, start):
                if document in place_of:
                    file.seek(begin + place_of[document] * VALUES * 4)
                    file.write(signature.tobytes())
            start += len(found)


def _names(tags: Sequence[Path], wanted: set[int]) -> dict[int, str]:
    names: dict[int, str] = {}
    start = 0
    for path in tags:
        found = shards.arrays(path, ["id"])["id"]
        names |= {start + n: name for n, name in enumerate(found) if start + n in wanted}
        start += len(found)
    return names


def _save(path: Path, array: np.ndarray) -> None:
    with replacing(path) as file:
        np.save(file, array)

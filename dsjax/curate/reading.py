"""Stage `read`: files of any kind to shards of documents.

A shard is a parquet file with the columns of `SCHEMA`. Small files share a shard; a large one gives
several. Which document is in which shard depends on names and sizes of the files alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from dsjax.curate import shards
from dsjax.curate.recipe import Recipe, Source
from dsjax.data import documents
from dsjax.files import replacing

VERSION = 2
PROBLEMS = 100  # that a report shows
SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("path", pa.string()), ("text", pa.string())]
)


@dataclasses.dataclass(frozen=True)
class Job:
    """Files of one source that are read together."""

    source: Source
    files: tuple[documents.Source, ...]
    shard_bytes: int
    skip: bool  # records and files that cannot be read


def plan(recipe: Recipe, out: Path | None = None) -> list[Job]:
    """Finds the files of all sources and divides them into jobs.

    Args:
      out: the folder of the result, whose files are no input, whatever an earlier call left there.

    Raises:
      ValueError: a glob matches no file; a file is in two sources.
    """
    jobs: list[Job] = []
    owners: dict[str, str] = {}
    for source in recipe.sources:
        key = f"source {source.name}: files"
        found = documents.find_sources(source.files, key=key, outside=out)
        found = _told_apart(found)
        for file in found:
            other = owners.setdefault(file.path, source.name)
            if other != source.name:
                raise ValueError(
                    f"{file.path} is in the sources {other} and {source.name}; leave it out of one"
                )
        whole = source.repositories != "off"
        for files in _grouped(found, recipe.shard_bytes, whole):
            jobs.append(Job(source, files, recipe.shard_bytes, recipe.on_bad == "skip"))
    return jobs


def identity(jobs: Sequence[Job]) -> list[Any]:
    """Returns what the shards depend on, as JSON: names, kinds, sizes and times of all files."""
    return [
        [
            dataclasses.asdict(job.source) | {"files": "", "kind": ""},
            [[file.name, file.kind, file.size, file.mtime_ns] for file in job.files],
            job.shard_bytes,
            job.skip,
        ]
        for job in jobs
    ]


def read(job: Job, folder: Path, number: int) -> dict[str, Any]:
    """Writes the shards of a job, `NUMBER-PART.parquet`, and what was skipped, `NUMBER.rejected`:
    JSON lines with the file and the problem.

    Returns:
      names of the shards, documents and bytes, how many records (or rests of files) were skipped,
      and what was wrong with the first of them.

    Raises:
      ValueError: something cannot be read, and is not to be skipped.
    """
    names: list[str] = []
    count, size = 0, 0
    with replacing(folder / f"{number:05}.rejected") as stream:
        rejected = _Rejected(stream)
        found = _documents(job, rejected)
        while (document := next(found, None)) is not None:
            name = f"{number:05}-{len(names):04}"
            rest = itertools.chain([document], found)
            rows, written = _write_shard(folder / f"{name}.parquet", rest, job)
            count, size = count + rows, size + written
            names.append(name)
    return {
        "shards": names,
        "documents": count,
        "bytes": size,
        "rejected": rejected.count,
        "problems": rejected.problems,
    }


def save_rejected(folder: Path, n_jobs: int, path: Path) -> None:
    """Joins what the jobs in a folder skipped into one file; no file if they skipped nothing."""
    parts = [folder / f"{number:05}.rejected" for number in range(n_jobs)]
    parts = [part for part in parts if part.stat().st_size]
    if not parts:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as stream:
        for part in parts:
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, stream)


class _Rejected:
    """Writes down what is skipped; a `documents.Rejected`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.count = 0
        self.problems: list[str] = []  # the first

    def __call__(self, file: documents.Source, problem: str) -> None:
        self.count += 1
        problem = _told(problem)
        if len(self.problems) < PROBLEMS:
            self.problems.append(problem)
        line = json.dumps({"file": file.path, "problem": problem})
        self._stream.write(line.encode() + b"\n")


def _grouped(
    files: Sequence[documents.Source], limit: int, whole: bool
) -> Iterator[tuple[documents.Source, ...]]:
    """Yields runs of files of at least `limit` bytes, but for the last; `whole` ones end only
    between repositories, which are the folders at the top.
    """
    group: list[documents.Source] = []
    size = 0
    for file in files:
        if size >= limit and not (whole and _top(group[-1]) == _top(file)):
            yield tuple(group)
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield tuple(group)


def _told_apart(files: Sequence[documents.Source]) -> Sequence[documents.Source]:
    """Returns files of several globs by names from the folder that they share, if two have one name
    below their own.
    """
    if len({file.name for file in files}) == len(files):
        return files
    root = os.path.commonpath([os.path.dirname(file.path) for file in files])
    return [
        dataclasses.replace(file, name=os.path.relpath(file.path, root).replace(os.sep, "/"))
        for file in files
    ]


def _top(file: documents.Source) -> str:
    return file.name.partition("/")[0]


def _documents(job: Job, rejected: documents.Rejected) -> Iterator[documents.Document]:
    note = rejected if job.skip else None
    try:
        yield from documents.read_documents(
            job.files, text_field=job.source.text_field, rejected=note
        )
    except ValueError as error:
        raise ValueError(
            f"source {job.source.name}: {_told(str(error))}; or go on without: --set on_bad=skip"
        ) from error


def _told(problem: str) -> str:
    """Names the option of a recipe in place of the trainer's key."""
    return problem.replace("data.text_field", "text_field of its Source in a recipe")


def _write_shard(path: Path, found: Iterator[documents.Document], job: Job) -> tuple[int, int]:
    """Writes documents until the shard is full or they end; returns rows and bytes."""
    count, size = 0, 0
    with shards.Writer(path, SCHEMA) as writer:
        for document in found:
            length = len(document.text.encode())
            row = {
                "id": f"{job.source.name}/{document.name}".encode("utf-8", "replace").decode(),
                "source": job.source.name,
                "path": document.source.name.encode("utf-8", "replace").decode(),
                "text": document.text,
            }
            writer.add(row, length)
            count, size = count + 1, size + length
            if size >= job.shard_bytes:
                break
    return count, size

"""Stage `read`: files of any kind to shards of documents.

A shard is a parquet file with the columns of `SCHEMA`. Small files share a shard; a large one gives
several. Which document is in which shard depends on names and sizes of the files alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dsjax.curate import shards
from dsjax.curate.recipe import Recipe, Source
from dsjax.data import documents

VERSION = 1
SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("path", pa.string()), ("text", pa.string())]
)


@dataclasses.dataclass(frozen=True)
class Job:
    """Files of one source that are read together."""

    source: Source
    files: tuple[documents.Source, ...]
    shard_bytes: int
    skip: bool  # files that cannot be read


def plan(recipe: Recipe) -> list[Job]:
    """Finds the files of all sources and divides them into jobs.

    Raises:
      ValueError: a glob matches no file; a file is in two sources.
    """
    jobs: list[Job] = []
    owners: dict[str, str] = {}
    for source in recipe.sources:
        found = documents.find_sources(source.files, key=f"source {source.name}: files")
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
    """Writes the shards of a job: `NUMBER-PART.parquet`.

    Returns:
      names of the shards, documents and bytes, and the files that were skipped.

    Raises:
      ValueError: a file cannot be read, and is not to be skipped.
    """
    rejected: list[dict[str, str]] = []
    names: list[str] = []
    count, size = 0, 0
    found = _documents(job, rejected)
    while (document := next(found, None)) is not None:
        name = f"{number:05}-{len(names):04}"
        rest = itertools.chain([document], found)
        rows, written = _write_shard(folder / f"{name}.parquet", rest, job)
        count, size = count + rows, size + written
        names.append(name)
    return {"shards": names, "documents": count, "bytes": size, "rejected": rejected}


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


def _documents(job: Job, rejected: list[dict[str, str]]) -> Iterator[documents.Document]:
    for file in job.files:
        try:
            yield from documents.read_documents([file], text_field=job.source.text_field)
        except ValueError as error:
            if not job.skip:
                raise ValueError(
                    f"source {job.source.name}: {error}; or go on without: --set on_bad=skip"
                ) from error
            rejected.append({"file": file.path, "reason": str(error)})


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

"""Stage `join`: the files of a repository that pass the rules become one document.

What comes after then sees whole repositories: near duplicates of repositories are removed, not of
files, which would leave repositories with holes (DeepSeek-Coder, arXiv 2401.14196, section 2.3).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dsjax.curate import reading, repositories, sampling, shards, tagging, words
from dsjax.curate.deciding import PASSED, SCHEMA
from dsjax.curate.shingles import shingles, signatures
from dsjax.data import splitting

VERSION = 3
_TAGS = ("id", "source", "bytes", "digest", "signature")  # what stage `buckets` reads
TAGS = pa.schema([tagging.SCHEMA.field(name) for name in _TAGS])


@dataclasses.dataclass(frozen=True)
class Job:
    """The shards of a job of stage `read`, which holds whole repositories."""

    documents: tuple[Path, ...]
    verdicts: tuple[Path, ...]
    order: str  # imports or random
    near: bool  # whether signatures are wanted
    samples: int
    seed: int


def join(job: Job, folder: Path, number: int) -> dict[str, Any]:
    """Writes NUMBER.parquet with documents, and NUMBER.tags.parquet and NUMBER.verdicts.parquet as
    the stages `tag` and `rules` would have.

    Returns:
      documents written, files in them, and the findings about files that were removed.
    """
    findings = sampling.Findings(job.samples, job.seed)
    count = files = 0
    paths = [folder / f"{number:05}{part}.parquet" for part in ("", ".tags", ".verdicts")]
    with contextlib.ExitStack() as stack:
        schemas = (reading.SCHEMA, TAGS, SCHEMA)
        documents, tags, verdicts = (
            stack.enter_context(shards.Writer(path, schema))
            for path, schema in zip(paths, schemas, strict=True)
        )
        for name, rows in itertools.groupby(_rows(job, findings), key=_repository):
            members = {_inside(row): row for row in rows}
            files += len(members)
            for row in _documents(name, members, job):
                size = len(row["text"].encode())
                documents.add(row, size)
                tags.add(_tags(row, size, job.near))
                verdicts.add({"verdict": PASSED})
                count += 1
    return {
        "documents": count,
        "files": files,
        "counts": findings.counts,
        "sides": {},
        "samples": findings.samples(),
    }


def _repository(row: shards.Row) -> str:
    return row["path"].partition("/")[0]


def _inside(row: shards.Row) -> str:
    """Returns where a document is in its repository: a path, with a number where a file has
    several documents.
    """
    place = row["id"].partition("/")[2]  # behind the source
    return place.partition("/")[2] or place


def _rows(job: Job, findings: sampling.Findings) -> Iterator[shards.Row]:
    """Yields the files that pass the rules; counts the others."""
    for path, verdicts in zip(job.documents, job.verdicts, strict=True):
        for row, judged in zip(shards.rows(path), shards.rows(verdicts), strict=True):
            if judged["verdict"] == PASSED:
                yield row
            else:
                findings.add(row, judged["verdict"], len(row["text"].encode()))


def _documents(name: str, members: dict[str, shards.Row], job: Job) -> Iterator[shards.Row]:
    """Yields a repository as one document, then the files that its order says nothing about."""
    texts = {path: row["text"] for path, row in members.items()}
    if job.order == "imports":
        texts = {
            path: text
            for path, text in texts.items()
            if repositories.suffix(path) in repositories.ORDERED
        }
        order: Sequence[str] = repositories.by_imports(texts, job.seed)
    else:
        order = repositories.at_random(texts, job.seed)
    if texts:
        source = next(iter(members.values()))["source"]
        row = {"id": f"{source}/{name}", "source": source, "path": name}
        yield row | {"text": repositories.join(texts, order)}
    yield from (row for path, row in members.items() if path not in texts)


def _tags(row: shards.Row, size: int, near: bool) -> shards.Row:
    signature = b""
    if near:
        signature = signatures(*shingles(words.cut([row["text"]]))).astype("<u4").tobytes()
    return {
        "id": row["id"],
        "source": row["source"],
        "bytes": size,
        "digest": splitting.digest_bytes(row["text"], tagging.DIGEST),
        "signature": signature,
    }

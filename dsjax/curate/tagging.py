"""Stage `tag`: measures every document of a shard. No decision is made here, so thresholds can
change without a second pass over the text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from dsjax.curate import code, language, rules, shards, signals, words
from dsjax.curate.shingles import shingles, signatures
from dsjax.curate.words import Words

VERSION = 1
SIGNALS = ("garbled", *signals.NAMES, *code.NAMES)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("language", pa.string()),  # of code: any
        ("score", pa.float64()),
        ("bytes", pa.int64()),
        ("digest", pa.binary(16)),  # of the text with normalised white space
        ("signature", pa.binary()),  # for near duplicates: uint32 [128], or nothing
        *((name, pa.float64()) for name in SIGNALS),  # NaN where a signal does not apply
    ]
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard of stage `read`."""

    path: Path
    kinds: Mapping[str, str]  # of sources, by name
    near: bool  # whether signatures are wanted


def tag(job: Job, folder: Path, number: int) -> dict[str, Any]:
    """Writes the measures of a shard, row by row, to a file of the same name."""
    del number
    count = 0
    with shards.Writer(folder / job.path.name, SCHEMA) as writer:
        for rows in shards.pieces(job.path):
            measured, sets = [], []
            for row in rows:
                found = words.cut(row["text"])
                measured.append(_measured(row, found, job.kinds[row["source"]]))
                if job.near:
                    sets.append(shingles(found))
            signed = signatures(sets).astype("<u4") if job.near else [b""] * len(rows)
            for values, signature in zip(measured, signed, strict=True):
                writer.add(values | {"signature": bytes(signature)})
            count += len(rows)
    return {"documents": count}


def _measured(row: shards.Row, found: Words, kind: str) -> shards.Row:
    text = row["text"]
    spoken, score = (rules.ANY, 1.0) if kind == "code" else language.identify(text)
    values = {"garbled": signals.garbled(text)}
    if kind == "code":
        values |= code.measure(text, row["path"])
    elif rules.is_measured(kind, spoken):
        values |= signals.prose(text, found, spoken)
    return {
        "id": row["id"],
        "source": row["source"],
        "language": spoken,
        "score": score,
        "bytes": len(text.encode()),
        "digest": digest(text),
        **{name: values.get(name, float("nan")) for name in SIGNALS},
    }


def digest(text: str) -> bytes:
    """Returns a hash, equal for texts that differ in white space alone."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()

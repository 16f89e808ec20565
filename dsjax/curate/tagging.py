"""Stage `tag`: measures every document of a shard. No decision is made here, so thresholds can
change without a second pass over the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dsjax.curate import code, language, rules, shards, signals, words
from dsjax.curate.shingles import shingles, signatures
from dsjax.data import splitting

VERSION = 2
DIGEST = 16  # bytes
SIGNALS = ("garbled", *signals.NAMES, *code.NAMES)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("language", pa.string()),  # of code: any
        ("score", pa.float64()),
        ("bytes", pa.int64()),
        ("digest", pa.binary(DIGEST)),  # of the text with normalised white space
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
            for values in _measured(rows, job):
                writer.add(values)
            count += len(rows)
    return {"documents": count}


def _measured(rows: Sequence[shards.Row], job: Job) -> list[shards.Row]:
    """Returns the measures of documents."""
    result = [_measured_alone(row, job.kinds[row["source"]]) for row in rows]
    texts = [row["text"][: words.MOST] for row in rows]
    groups: dict[str, list[int]] = {}  # by the language of prose, "" for the rest
    for place, row in enumerate(rows):
        spoken = result[place]["language"]
        prose = spoken != rules.ANY and rules.is_measured(job.kinds[row["source"]], spoken)
        groups.setdefault(spoken if prose else "", []).append(place)
    for spoken, members in groups.items():
        for places in words.batches(members, texts) if spoken or job.near else ():
            chosen = [texts[place] for place in places]
            found = words.cut(chosen)
            if spoken:
                for place, values in zip(places, signals.prose(chosen, found, spoken), strict=True):
                    result[place] |= values
            if job.near:
                signed = signatures(*shingles(found)).astype("<u4")
                for place, signature in zip(places, signed, strict=True):
                    result[place]["signature"] = signature.tobytes()
    return result


def _measured_alone(row: shards.Row, kind: str) -> shards.Row:
    """Returns what needs no words."""
    text, measured = row["text"], row["text"][: words.MOST]
    spoken, score = (rules.ANY, 1.0) if kind == "code" else language.identify(text)
    return {
        "id": row["id"],
        "source": row["source"],
        "language": spoken,
        "score": score,
        "bytes": len(text.encode()),
        "digest": splitting.digest_bytes(text, DIGEST),
        "signature": b"",
        **dict.fromkeys(SIGNALS, float("nan")),
        "garbled": signals.garbled(measured),
        **(code.measure(measured, row["path"]) if kind == "code" else {}),
    }

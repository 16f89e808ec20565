"""Finds in a pool of texts those that are like a seed, in rounds (DeepSeekMath, arXiv 2402.03300,
section 2.1): `python tools/mine.py` is this.

A round trains a classifier on the seed against texts of the pool at random, and keeps the best part
of the pool. Of a domain of which more than a tenth is kept, all pages join the seed of the next
round, since what the classifier misses there is what it has yet to learn. Rounds end when one finds
about nothing new. DeepSeekMath had people choose URLs within those domains; here a domain is taken
whole.

OUT/
  work/list/                   size and domain of each text
  work/N/{train,score,choose}/ of round N
  text/mined-*.parquet         the result: id, text, score
  mined.json                   rounds, domains, and texts on both sides of the border
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from rich.console import Console

from dsjax import tables
from dsjax.config.rules import require
from dsjax.curate import classifier, sampling, shards
from dsjax.curate.classifier import Settings
from dsjax.curate.stages import Stage, Workers, fingerprint, owned
from dsjax.data import documents
from dsjax.display import Display, size
from dsjax.files import replacing, write_json

VERSION = 3
LISTED = pa.schema([("position", pa.uint64()), ("bytes", pa.int64()), ("domain", pa.string())])
MINED = pa.schema([("id", pa.string()), ("text", pa.string()), ("score", pa.float64())])
DOMAIN_SHARE = 0.1  # of a domain's pages that are kept, above which all of them join the seed
DOMAIN_PAGES = 10  # of which there are at least so many, or chance decides
NOTHING_NEW = 0.02  # share of new texts in what is kept, below which rounds end
_BORDER = 10  # texts on each side of the border that are shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mining:
    """What to look for, and where."""

    seed: str  # globs of texts to find more of
    pool: str  # globs of texts to look in
    text_field: str = "text"
    url_field: str = ""  # of the pool's records, from which domains are known; empty: one round
    keep: float = 0.1  # of the pool's bytes
    rounds: int = 4
    examples: int = 500_000  # of each kind to learn from, at most
    settings: Settings = dataclasses.field(default_factory=Settings)
    random: int = 0  # seed of all choices

    def __post_init__(self) -> None:
        require(0 < self.keep < 1, f"--keep {self.keep} must lie between 0 and 1")
        for name in ("rounds", "examples"):
            value = getattr(self, name)
            require(value >= 1, f"--{name} {value} must be at least 1")


class Text(NamedTuple):
    """A text of the pool."""

    id: str
    text: str
    domain: str  # "" where none is known


@dataclasses.dataclass(frozen=True)
class Listing:
    """A file of the pool."""

    file: documents.Source
    mining: Mining


@dataclasses.dataclass(frozen=True)
class Training:
    """The seed, the pool with its lists, and the domains that join the seed."""

    seed: tuple[documents.Source, ...]
    pool: tuple[documents.Source, ...]
    lists: Path
    domains: frozenset[str]
    mining: Mining


@dataclasses.dataclass(frozen=True)
class Scoring:
    """A file of the pool, and the model."""

    file: documents.Source
    model: Path
    mining: Mining


@dataclasses.dataclass(frozen=True)
class Choosing:
    """Lists and scores of all files, and what the round before chose."""

    lists: Path
    scores: Path
    before: Path | None
    n_files: int
    keep: float


@dataclasses.dataclass(frozen=True)
class Writing:
    """A file of the pool, what is chosen of it, and the places to show: [place, whether kept]."""

    file: documents.Source
    chosen: Path
    scores: Path
    border: tuple[tuple[int, bool], ...]
    mining: Mining


def mine(mining: Mining, pool: Workers) -> dict[str, Any]:
    """Runs the rounds; returns the report.

    Raises:
      ValueError: a file cannot be read, or floret is not installed.
    """
    seed = tuple(documents.find_sources(mining.seed, key="--seed", outside=pool.out))
    files = tuple(documents.find_sources(mining.pool, key="--pool", outside=pool.out))
    both = {file.path for file in seed} & {file.path for file in files}
    require(not both, f"{min(both, default='')} is of --seed and of --pool; leave it out of one")
    known = [[file.name, file.size, file.mtime_ns] for file in (*seed, *files)]
    choice = dataclasses.asdict(dataclasses.replace(mining, seed="", pool="", rounds=1, keep=0.5))
    key = fingerprint(VERSION, classifier.library(), known, len(seed), choice)
    jobs = [Listing(file, mining) for file in files]
    lists = pool.run(Stage("work/list", list_texts, jobs, key))
    domains: frozenset[str] = frozenset()
    rounds: list[dict[str, Any]] = []
    before: Path | None = None
    scores, chosen = lists.folder, ""
    for number in range(1, mining.rounds + 1 if mining.url_field else 2):
        place, key = f"work/{number}", fingerprint(key, sorted(domains))
        training = Training(seed, files, lists.folder, domains, mining)
        trained = pool.run(Stage(f"{place}/train", train, [training], key))
        model = trained.folder / "model.bin"
        scorings = [Scoring(file, model, mining) for file in files]
        scores = pool.run(Stage(f"{place}/score", score, scorings, key)).folder
        choosing = Choosing(lists.folder, scores, before, len(files), mining.keep)
        chosen = fingerprint(chosen, key, mining.keep)
        found = pool.run(Stage(f"{place}/choose", choose, [choosing], chosen))
        rounds.append(found.found[0] | trained.found[0])
        before = found.folder
        domains = frozenset(rounds[-1]["domains"])
        if rounds[-1]["new"] < NOTHING_NEW * rounds[-1]["documents"]:
            break
    assert before is not None
    border: dict[int, list[tuple[int, bool]]] = {}
    for file, place, kept in rounds[-1]["border"]:
        border.setdefault(file, []).append((place, kept))
    writings = [
        Writing(file, before / name, scores / name, tuple(border.get(number, ())), mining)
        for number, file in enumerate(files)
        for name in (f"{number:05}.npy",)
    ]
    written = pool.run(Stage("text", write, writings, chosen))
    shown = [sample for found in written.found for sample in found["border"]]
    return {
        "pool": _total(lists.found),
        "mined": _total(written.found),
        "rounds": [{name: row[name] for name in row if name != "border"} for row in rounds],
        "border": sorted(shown, key=lambda sample: -sample["score"]),
    }


def mine_into(mining: Mining, out: Path, workers: int) -> dict[str, Any]:
    """Mines into a folder, going on where an earlier call was stopped; returns the report."""
    with owned(out, 0), Display(Console(stderr=True)) as display:
        with Workers(workers, out, display) as pool:
            report = mine(mining, pool)
        write_json(out / "mined.json", report)
        display.say(f"wrote {out / 'text'} and {out / 'mined.json'}")
    return report


def print_summary(report: dict[str, Any], console: Console) -> None:
    """Prints the rounds, and what is next to the border."""
    heads = (">round", ">examples", ">kept", ">bytes", ">new", ">score from", ">domains")
    rows = [
        (number, row["examples"], row["documents"], size(row["bytes"]), row["new"],
         f"{row['threshold']:.4f}", len(row["domains"]))
        for number, row in enumerate(report["rounds"], 1)
    ]  # fmt: skip
    console.print(tables.table("", heads, rows))
    for sample in report["border"]:
        what = "kept" if sample["kept"] else "not "
        beginning = " ".join(sample["text"].split())[:60]
        console.print(f"  {what} {sample['score']:.4f}  {beginning}", markup=False, highlight=False)


def list_texts(job: Listing, folder: Path, number: int) -> dict[str, Any]:
    """Writes NUMBER.parquet: a place among random ones, the size and the domain of each text."""
    count = n_bytes = 0
    with shards.Writer(folder / f"{number:05}.parquet", LISTED) as writer:
        for text in _texts(job.file, job.mining):
            length = len(text.text.encode())
            position = sampling.position(text.id, job.mining.random)
            writer.add({"position": position, "bytes": length, "domain": text.domain})
            count, n_bytes = count + 1, n_bytes + length
    return {"documents": count, "bytes": n_bytes}


def train(job: Training, folder: Path, number: int) -> dict[str, Any]:
    """Writes model.bin; returns of how many texts of each kind it learned."""
    del number
    columns = [_listed(job.lists, place) for place in range(len(job.pool))]
    joins = [np.isin(part["domain"].astype("U"), sorted(job.domains)) for part in columns]
    others = [~part for part in joins]
    seed = [
        sampling.position(_written(document.name), job.mining.random)
        for document in documents.read_documents(job.seed, text_field=job.mining.text_field)
    ]
    like_places = np.concatenate([np.array(seed, np.uint64), _places(columns, joins)])
    other_places = _places(columns, others)
    count = min(job.mining.examples, len(like_places), len(other_places))
    like_last, other_last = _last(like_places, count), _last(other_places, count)

    def like() -> Iterator[str]:
        found = documents.read_documents(job.seed, text_field=job.mining.text_field)
        for document, place in zip(found, seed, strict=True):
            if place <= like_last:
                yield document.text
        yield from _chosen(job, columns, joins, like_last)

    other = _chosen(job, columns, others, other_last)
    path = folder / "model.bin"
    return {"examples": classifier.train(like(), other, path, job.mining.settings)}


def score(job: Scoring, folder: Path, number: int) -> dict[str, Any]:
    """Writes NUMBER.npy: how like the seed each text is, float32."""
    texts = (text.text for text in _texts(job.file, job.mining))
    found = np.fromiter(classifier.scores(job.model, texts), np.float32)
    with replacing(folder / f"{number:05}.npy") as file:
        np.save(file, found)
    return {}


def choose(job: Choosing, folder: Path, number: int) -> dict[str, Any]:
    """Writes NUMBER.npy for each file: which texts are kept, bool.

    Returns:
      how many, how many of them are new, the lowest score among them, the domains that join the
      seed, and the places next to the border: [file, place, whether kept].
    """
    del number
    parts = [_listed(job.lists, place) for place in range(job.n_files)]
    bounds = np.cumsum([0, *(len(part["bytes"]) for part in parts)])
    sizes = np.concatenate([part["bytes"] for part in parts])
    scores = np.concatenate([np.load(job.scores / f"{n:05}.npy") for n in range(job.n_files)])
    order = np.argsort(-scores, kind="stable")  # equal ones as they come
    count = int(np.searchsorted(np.cumsum(sizes[order]), job.keep * sizes.sum(), side="right"))
    count = max(count, min(1, len(order)))
    kept = np.zeros(len(scores), bool)
    kept[order[:count]] = True
    old = np.zeros(len(scores), bool)
    if job.before is not None:
        old = np.concatenate([np.load(job.before / f"{n:05}.npy") for n in range(job.n_files)])
    for place, (start, end) in enumerate(itertools.pairwise(bounds)):
        with replacing(folder / f"{place:05}.npy") as file:
            np.save(file, kept[start:end])
    names = np.concatenate([part["domain"].astype("U") for part in parts])
    border = order[max(count - _BORDER, 0) : count + _BORDER]
    files = np.searchsorted(bounds, border, side="right") - 1
    places = zip(files.tolist(), (border - bounds[files]).tolist(), strict=True)
    return {
        "documents": count,
        "bytes": int(sizes[kept].sum()),
        "new": int((kept & ~old).sum()),
        "threshold": float(scores[order[count - 1]]) if count else 1.0,
        "domains": _domains(names, kept),
        "border": [[*place, bool(kept[n])] for place, n in zip(places, border, strict=True)],
    }


def write(job: Writing, folder: Path, number: int) -> dict[str, Any]:
    """Writes mined-NUMBER.parquet with what is kept, if anything is; returns how much, and the
    texts to show.
    """
    chosen, scores = np.load(job.chosen), np.load(job.scores)
    shown = dict(job.border)
    border: list[dict[str, Any]] = []
    count = n_bytes = 0
    with contextlib.ExitStack() as stack:
        path = folder / f"mined-{number:05}.parquet"
        writer = stack.enter_context(shards.Writer(path, MINED)) if chosen.any() else None
        for place, text in enumerate(_texts(job.file, job.mining)):
            row = {"id": text.id, "text": text.text, "score": round(float(scores[place]), 6)}
            if place in shown:
                beginning = text.text[: sampling.CHARACTERS]
                border.append(row | {"text": beginning, "kept": shown[place]})
            if writer and chosen[place]:
                length = len(text.text.encode())
                writer.add(row, length)
                count, n_bytes = count + 1, n_bytes + length
    return {"documents": count, "bytes": n_bytes, "border": border}


def _texts(file: documents.Source, mining: Mining) -> Iterator[Text]:
    """Yields the texts of a file that are not empty."""
    if not mining.url_field:
        for document in documents.read_documents([file], text_field=mining.text_field):
            yield Text(_written(document.name), document.text, "")
        return
    for place, record in documents.read_records([file]):
        text = documents.text_of(record, mining.text_field, place)
        if text:
            name = f"{file.name}:{place.rpartition(':')[2]}"
            url = record.get(mining.url_field)
            yield Text(_written(name), text, domain(url if isinstance(url, str) else ""))


def domain(url: str) -> str:
    """Returns the host of a URL without "www.", or nothing if it has none."""
    try:
        host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except ValueError:
        return ""
    return host.removeprefix("www.")


def _written(name: str) -> str:
    return name.encode("utf-8", "replace").decode()


def _listed(folder: Path, number: int) -> dict[str, np.ndarray]:
    return shards.arrays(folder / f"{number:05}.parquet", LISTED.names)


def _places(
    columns: Sequence[Mapping[str, np.ndarray]], members: Sequence[np.ndarray]
) -> np.ndarray:
    return np.concatenate(
        [part["position"][member] for part, member in zip(columns, members, strict=True)]
    )


def _last(places: np.ndarray, count: int) -> int:
    """Returns the largest of the `count` smallest places, or -1 if there are none."""
    return int(np.partition(places, count - 1)[count - 1]) if count else -1


def _chosen(
    job: Training,
    columns: Sequence[Mapping[str, np.ndarray]],
    members: Sequence[np.ndarray],
    last: int,
) -> Iterator[str]:
    """Yields the texts of the pool that are members, up to this place."""
    for file, part, member in zip(job.pool, columns, members, strict=True):
        wanted = member & (part["position"] <= last)
        if wanted.any():
            texts = zip(_texts(file, job.mining), wanted.tolist(), strict=True)
            yield from (text.text for text, taken in texts if taken)


def _domains(names: np.ndarray, kept: np.ndarray) -> list[str]:
    """Returns the domains of which much is kept."""
    found, place = np.unique(names, return_inverse=True)
    pages = np.bincount(place, minlength=len(found))
    share = np.bincount(place, kept, minlength=len(found)) / np.maximum(pages, 1)
    chosen = (share > DOMAIN_SHARE) & (pages >= DOMAIN_PAGES) & (found != "")
    return found[chosen].tolist()


def _total(found: Sequence[Mapping[str, Any]]) -> list[int]:
    return [sum(part[name] for part in found) for name in ("documents", "bytes")]

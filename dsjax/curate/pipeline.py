"""All stages in order: what each reads, and on what its files depend."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.curate import (
    deciding,
    decontaminating,
    deduplicating,
    joining,
    language,
    passages,
    reading,
    renaming,
    report,
    rules,
    shingles,
    tagging,
    writing,
)
from dsjax.curate.recipe import Recipe
from dsjax.curate.stages import Result, Stage, Workers, fingerprint
from dsjax.data import documents


class Shard(NamedTuple):
    """Documents, with tags and verdicts in the same order."""

    documents: Path
    tags: Path
    verdicts: Path
    n_documents: int


def run(
    recipe: Recipe, table: rules.Table, jobs: Sequence[reading.Job], pool: Workers
) -> dict[str, Any]:
    """Runs the stages; returns the report.

    Args:
      table: the rules, with the recipe's changes.
      jobs: of stage `read`.

    Raises:
      ValueError: the files hold no document; or see `prepare.prepare`.
    """
    key = fingerprint(reading.VERSION, reading.identity(jobs))
    read = pool.run(Stage("work/read", reading.read, jobs, key))
    names = [f"{name}.parquet" for found in read.found for name in found["shards"]]
    if not names:
        raise ValueError(_nothing_read(jobs, read))
    kinds = {source.name: source.kind for source in recipe.sources}
    tagged = pool.run(_tagging(recipe, kinds, names, read))
    wanted = recipe.languages, recipe.language_score
    key = fingerprint(tagged.key, deciding.VERSION, wanted, sorted(table.items()))
    judged = [deciding.Job(tagged.folder / name, kinds, *wanted, table) for name in names]
    decided = pool.run(Stage("work/rules", deciding.decide, judged, key))
    counts = [found["documents"] for found in tagged.found]
    shards = [
        Shard(read.folder / name, tagged.folder / name, decided.folder / name, count)
        for name, count in zip(names, counts, strict=True)
    ]
    removed: list[dict[str, Any]] = []
    if any(source.repositories != "off" for source in recipe.sources):
        shards, joined = _joined(recipe, jobs, read, shards, (decided, pool))
        removed, key = joined.found, joined.key
    if recipe.decontaminate:
        shards, key = _decontaminated(recipe, shards, key, pool)
    compared = _compared(recipe, shards, key, pool) if recipe.duplicates != "off" else None
    written = pool.run(_writing(recipe, shards, key, compared))
    totals = {name: [0, 0] for name in kinds}
    for job, found in zip(jobs, read.found, strict=True):
        before = totals[job.source.name]
        totals[job.source.name] = [before[0] + found["documents"], before[1] + found["bytes"]]
    findings = [*removed, *written.found]
    gathered = report.gather(kinds, totals, decided.found, findings, samples=recipe.samples)
    return {
        **gathered,
        "duplicate_groups": compared.found[0]["groups"] if compared else {},
        "renamed": sum(found["renamed"] for found in written.found),
        "rejected": sum(found["rejected"] for found in read.found),
        "problems": [text for found in read.found for text in found["problems"]][
            : reading.PROBLEMS
        ],
    }


def _nothing_read(jobs: Sequence[reading.Job], read: Result) -> str:
    problems = [text for found in read.found for text in found["problems"]]
    skipped = sum(found["rejected"] for found in read.found)
    why = f"what they hold was skipped ({skipped:,}), first: {problems[0]}" if problems else "empty"
    globs = ", ".join(dict.fromkeys(job.source.files for job in jobs))
    return f"the files of {globs} have no document: {why}; name files that hold text"


def _tagging(recipe: Recipe, kinds: Mapping[str, str], names: Sequence[str], read: Result) -> Stage:
    near = recipe.duplicates == "near"
    prose = any(kind != "code" for kind in kinds.values())
    libraries = (prose and language.library(), near and shingles.library())
    jobs = [tagging.Job(read.folder / name, kinds, near) for name in names]
    key = fingerprint(read.key, tagging.VERSION, kinds, libraries)
    return Stage("work/tag", tagging.tag, jobs, key)


def _joined(
    recipe: Recipe,
    jobs: Sequence[reading.Job],
    read: Result,
    shards: Sequence[Shard],
    before: tuple[Result, Workers],
) -> tuple[list[Shard], Result]:
    """Joins the repositories; returns the shards after that, those of other sources included."""
    decided, pool = before
    parts = iter(shards)
    groups = [[next(parts) for _ in found["shards"]] for found in read.found]
    joins: list[joining.Job] = []
    result: list[list[Shard] | None] = []
    for job, group in zip(jobs, groups, strict=True):
        order = job.source.repositories
        result.append(group if order == "off" else None)
        if order != "off":
            texts = tuple(shard.documents for shard in group)
            verdicts = tuple(shard.verdicts for shard in group)
            near = recipe.duplicates == "near"
            joins.append(joining.Job(texts, verdicts, order, near, recipe.samples, recipe.seed))
    key = fingerprint(decided.key, joining.VERSION, [job.order for job in joins], recipe.seed)
    joined = pool.run(Stage("work/join", joining.join, joins, fingerprint(key, recipe.samples)))
    numbers = itertools.count()
    after = [group if group is not None else [_shard(joined, next(numbers))] for group in result]
    return [shard for group in after for shard in group], joined


def _shard(joined: Result, number: int) -> Shard:
    texts, tags, verdicts = (
        joined.folder / f"{number:05}{part}.parquet" for part in ("", ".tags", ".verdicts")
    )
    return Shard(texts, tags, verdicts, joined.found[number]["documents"])


def _compared(recipe: Recipe, shards: Sequence[Shard], key: str, pool: Workers) -> Result:
    """Finds duplicates, in three stages."""
    threshold = recipe.jaccard if recipe.duplicates == "near" else None
    tags = tuple(shard.tags for shard in shards)
    verdicts = tuple(shard.verdicts for shard in shards)
    sources = tuple(source.name for source in recipe.sources)
    key = fingerprint(key, deduplicating.VERSION, threshold, sources)
    job = deduplicating.Gathering(tags, verdicts, sources, threshold)
    gathered = pool.run(Stage("work/buckets", deduplicating.gather, [job], key))
    starts = _starts(shards)
    cuts = [
        deduplicating.Cutting(shard.documents, gathered.folder, start, shard.n_documents)
        for shard, start in zip(shards, starts, strict=True)
    ]
    cut = pool.run(Stage("work/shingles", deduplicating.cut, cuts, key))
    job = deduplicating.Comparing(tags, starts, gathered.folder, cut.folder, threshold)
    return pool.run(Stage("work/duplicates", deduplicating.compare, [job], key))


def _decontaminated(
    recipe: Recipe, shards: Sequence[Shard], key: str, pool: Workers
) -> tuple[list[Shard], str]:
    """Finds what quotes the evaluation files, in two stages; returns the shards with the verdicts
    after that, and their key.
    """
    files = documents.find_sources(recipe.decontaminate, key="decontaminate", outside=pool.out)
    own = fingerprint(decontaminating.VERSION, decontaminating.identity(files))
    index = pool.run(Stage("work/evaluation", decontaminating.index, [files], own)).folder
    jobs = [decontaminating.Job(shard.documents, shard.verdicts, index) for shard in shards]
    key = fingerprint(key, own)
    folder = pool.run(Stage("work/contaminated", decontaminating.mark, jobs, key)).folder
    return [
        shard._replace(verdicts=folder / f"{number:05}.parquet")
        for number, shard in enumerate(shards)
    ], key


def _starts(shards: Sequence[Shard]) -> tuple[int, ...]:
    """Returns the number of each shard's first document among all."""
    return tuple(itertools.accumulate([0, *(shard.n_documents for shard in shards[:-1])]))


def _writing(recipe: Recipe, shards: Sequence[Shard], key: str, compared: Result | None) -> Stage:
    """Plans the last stage; `compared` is of stage `duplicates`."""
    replaced = recipe.personal == "replace"
    choice = (
        *(recipe.passages, replaced, recipe.rename, recipe.heldout_fraction),
        *(recipe.samples, recipe.seed),
    )
    copies = compared and compared.folder / "verdicts.npy"
    jobs = [
        writing.Job(shard.documents, shard.verdicts, copies, start, *choice)
        for shard, start in zip(shards, _starts(shards), strict=True)
    ]
    libraries = (
        passages.library() if recipe.passages else "",
        renaming.library() if recipe.rename else "",
    )
    own = fingerprint(key, compared and compared.key, writing.VERSION, choice, libraries)
    return Stage("text", writing.write, jobs, own)

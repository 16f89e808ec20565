"""Prepares text in a folder; `python tools/prepare.py` is this.

OUT/
  recipe.json                  what was asked for
  work/{read,tag,rules}/       files of the stages, which may be removed when all is done
  text/train-*.parquet         the result, for data.files
  text/heldout-*.parquet       for data.heldout_files
  rejected.jsonl               with on_bad=skip: what could not be read
  report.json, report.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dsjax import settings, tables
from dsjax.curate import pipeline, reading, report, rules, tokenizing, writing
from dsjax.curate.recipe import Recipe, Source
from dsjax.curate.stages import Workers, owned
from dsjax.display import Display, size
from dsjax.files import write_json


def recipe_of(
    path: str | None, inputs: Sequence[str], kind: str, assignments: Sequence[str]
) -> Recipe:
    """Returns the recipe of a file, or one source of `inputs` (globs), with `--set` applied.

    Raises:
      ValueError: the file or an assignment is not valid.
    """
    if path is not None:
        loaded = settings.load_any(path, (Recipe,))
    else:
        source = Source(name="input", files=",".join(inputs), kind=kind)  # pyright: ignore
        loaded = Recipe(sources=(source,))
    return settings.override(loaded, assignments)


def prepare(
    recipe: Recipe, out: Path, workers: int, *, process: int = 0, processes: int = 1
) -> dict[str, Any]:
    """Prepares text as the recipe says, going on where an earlier call was stopped.

    Args:
      workers: processes of this machine.
      process, processes: which of how many machines that share `out` this is; number 0 alone
        tokenizes, and writes the recipe and the report.

    Returns:
      the report, as report.json has it.

    Raises:
      ValueError: the recipe does not fit the files, a file cannot be read, or `out` holds something
        else. (What earlier calls left in `out` is no input, wherever the globs reach.)
      OSError: a file cannot be written, or a worker was killed.
    """
    table = rules.table(recipe.rules)
    jobs = reading.plan(recipe, out)
    with owned(out, process), Display(Console(stderr=True)) as display:
        with Workers(workers, out, display, process=process, processes=processes) as pool:
            result = pipeline.run(recipe, table, jobs, pool)
        if process:
            return result
        write_json(out / "recipe.json", settings.to_dict(recipe))
        reading.save_rejected(out / "work/read", len(jobs), out / "rejected.jsonl")
        if recipe.tokenizer:
            show = display.counting("tokens")
            tokens = tokenizing.tokenize(out, recipe.tokenizer, recipe.cache_dir, show)
            result = {**result, "tokens": tokens}
        report.save(result, table, out)
        display.say(f"wrote {out / 'text'} and {out / 'report.html'}")
    return result


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the funnel of each source."""
    rows = []
    for name, source in summary["sources"].items():
        amounts = [("read", source["read"])]
        removed = sorted(source["removed"].items(), key=lambda item: -item[1][0])
        amounts += [(f"removed: {verdict}", count) for verdict, count in removed]
        amounts += [(f"kept: {side}", source[side]) for side in writing.SIDES]
        rows += [(name, what, count[0], size(count[1])) for what, count in amounts]
    console.print(tables.table("", ("source", "", ">documents", ">bytes"), rows))
    if count := summary["renamed"]:
        console.print(f"  {count:,} Python files have renamed variables")
    if count := summary["rejected"]:
        console.print(f"  {count:,} records or files could not be read; rejected.jsonl lists them")
    for side, found in summary.get("tokens", {}).items():
        per_token = found["bytes_per_token"]
        console.print(f"  {side}: {found['tokens']:,} tokens, {per_token} bytes per token")

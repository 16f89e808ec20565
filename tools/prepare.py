"""Prepares text for training: measures it, removes what fails rules, splits off held-out text.

RECIPE is a Python file that ends with `config = Recipe(...)` (docs/prepare.md); without one, all
input is a single source.

  # a folder of pages
  python tools/prepare.py --input 'pages/*.jsonl.gz' --kind web --out prepared
  # source code, with other thresholds
  python tools/prepare.py --input 'src/**/*.py' --kind code --out prepared \\
    --set rules=code.any.comments=off,code.any.longest_line=..2000 on_bad=skip
  # several sources, on eight cores; then train on the result
  python tools/prepare.py recipe.py --out prepared --workers 8
  python tools/train.py --set 'data.files=prepared/text/train-*.parquet' \\
    'data.heldout_files=prepared/text/heldout-*.parquet'
  # on a cluster: any number of machines on one output
  srun -n 16 bash -c 'python tools/prepare.py recipe.py --out prepared \\
    --num-processes 16 --process-id $SLURM_PROCID'

DIR gets text/train-*.parquet, text/heldout-*.parquet, report.json and report.html, which shows what
each rule removed, with samples. A stopped command, given again, goes on where it was; a changed
recipe repeats only the stages that it concerns. The result is the same on any number of workers.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dsjax import command


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    add = result.add_argument
    add("recipe", metavar="RECIPE", nargs="?", help="file with sources, rules and options")
    add("--input", metavar="GLOB", nargs="+", default=[], help="text, JSON lines or parquet")
    kinds = ("web", "plain", "code", "math")
    add("--kind", choices=kinds, help="rules for --input (default: plain)")
    add("--out", metavar="DIR", type=Path, required=True, help="folder of the result")
    add("--workers", metavar="N", type=int, default=os.cpu_count(), help="default: %(default)s")
    group = result.add_argument_group("several machines that share DIR", "give both, or none")
    group.add_argument("--num-processes", metavar="N", type=int, help="how many there are")
    group.add_argument("--process-id", metavar="I", type=int, help="number of this one, from 0")
    text = "change options of the recipe, e.g. heldout_fraction=0.05 languages=en; repeatable"
    add("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help=text)
    command.add_json(result)
    return result


def execute(arguments: argparse.Namespace) -> None:
    if bool(arguments.recipe) == bool(arguments.input):
        parser().error("give either RECIPE or --input GLOB")
    if arguments.recipe and arguments.kind:
        parser().error("--kind is of --input; in a recipe each source has its own")
    if arguments.workers < 1:
        parser().error("--workers is at least 1")
    process, processes = arguments.process_id or 0, arguments.num_processes or 1
    if (arguments.process_id is None) != (arguments.num_processes is None):
        parser().error("--num-processes and --process-id go together")
    if not 0 <= process < processes:
        parser().error("--process-id counts from 0 to one less than --num-processes")
    from dsjax import tables
    from dsjax.curate import prepare

    kind = arguments.kind or "plain"
    recipe = prepare.recipe_of(arguments.recipe, arguments.input, kind, arguments.set)
    report = prepare.prepare(
        recipe, arguments.out, arguments.workers, process=process, processes=processes
    )
    tables.show(report, prepare.print_summary, arguments.json)


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

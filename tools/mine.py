"""Finds texts that are like a seed in a large pool, as DeepSeekMath found mathematics in web pages.

  # pages like those of math/, in rounds: domains of which much is found teach the next round
  python tools/mine.py --seed 'math/*.jsonl' --pool 'pages/*.jsonl.gz' --url-field url --out mined
  # manuals like these among all that was prepared; one round, since no domains are known
  python tools/mine.py --seed 'good/*.md' --pool 'prepared/text/train-*.parquet' --keep 0.05 \\
    --out mined
  python tools/train.py --set 'data.files=mined/text/mined-*.parquet'

DIR gets text/mined-*.parquet, with a score per text, and mined.json, which shows the rounds, the
domains that joined the seed, and ten texts on each side of the border. Another --keep takes
seconds for the first round. A stopped command, given again, goes on where it was. Prepare the pool
before (tools/prepare.py): what is there twice counts twice.
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
    add("--seed", metavar="GLOB", required=True, help="texts to find more of")
    add("--pool", metavar="GLOB", required=True, help="texts to look in")
    add("--out", metavar="DIR", type=Path, required=True, help="folder of the result")
    add("--text-field", metavar="NAME", default="text", help="of records (default: %(default)s)")
    add("--url-field", metavar="NAME", default="", help="of the pool's records; without: one round")
    text = "part of the pool's bytes to keep (default: %(default)s)"
    add("--keep", metavar="SHARE", type=float, default=0.1, help=text)
    add("--rounds", metavar="N", type=int, default=4, help="at most (default: %(default)s)")
    text = "texts of each kind to learn from, at most (default: %(default)s)"
    add("--examples", metavar="N", type=int, default=500_000, help=text)
    add("--workers", metavar="N", type=int, default=os.cpu_count(), help="default: %(default)s")
    command.add_json(result)
    return result


def execute(arguments: argparse.Namespace) -> None:
    if arguments.workers < 1:
        parser().error("--workers is at least 1")
    from dsjax import tables
    from dsjax.curate import mining

    given = mining.Mining(
        seed=arguments.seed,
        pool=arguments.pool,
        text_field=arguments.text_field,
        url_field=arguments.url_field,
        keep=arguments.keep,
        rounds=arguments.rounds,
        examples=arguments.examples,
    )
    report = mining.mine_into(given, arguments.out, arguments.workers)
    tables.show(report, mining.print_summary, arguments.json)


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

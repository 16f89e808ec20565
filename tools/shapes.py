"""Makes a toy that names and draws coloured shapes, from nothing: Janus' training in small.

  # everything, in runs/shapes_tiny
  python tools/shapes.py
  # another seed, in a folder of its own
  python tools/shapes.py --seed 1 --workdir runs/shapes_1

A VQ tokenizer, then the three stages of Janus-Pro; each is a run in a folder of its own. The same
command, given again, goes on where it was stopped and skips what is done. DIR/shapes.json then
tells how many held-out pictures are named rightly and how many drawings agree with their prompts,
and DIR/drawn.png shows some. Ctrl-C or SIGTERM saves and stops. Exit codes: 0 finished, 1 failed,
2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsjax import command


def execute(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from dsjax.janus import from_nothing
    from dsjax.parallel import compilation
    from dsjax.train import host_memory

    config = from_nothing.load_config(arguments.config, seed=arguments.seed)
    folder = arguments.workdir or Path("runs") / config.name
    host_memory.keep_freed()
    compilation.use_persistent_cache("")
    return from_nothing.run(config, folder, command=command.line(), console=Console())


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    result.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        default="configs/pipelines/shapes_tiny.py",
        help="config file of a toy (default: %(default)s)",
    )
    result.add_argument(
        "--seed", type=int, metavar="N", help="of data and runs (default: those of the config)"
    )
    result.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="folder of everything (default: runs/<name of the config>)",
    )
    return result


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

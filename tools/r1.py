"""Runs R1's pipeline: base, R1-Zero, cold start, reasoning, rejection sampling, scenarios, student.

  # the countdown game with a small model, in runs/r1_tiny
  python tools/r1.py
  # a shorter reinforcement learning, in a folder of its own
  python tools/r1.py --workdir runs/short --set reasoning.train.steps=20

Each stage is a run in a folder of its name. The same command, given again, goes on where it was
stopped and skips what is done. After each stage r1.json and r1.png tell held-out accuracy, length,
format, entropy and some answers. Ctrl-C or SIGTERM saves and stops. Exit codes: 0 finished,
1 failed, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsjax import command


def execute(arguments: argparse.Namespace) -> int:
    from dsjax.parallel import compilation, processes
    from dsjax.posttrain import stages
    from dsjax.train import host_memory

    config = stages.load(arguments.config, arguments.set, seed=arguments.seed)
    folder = arguments.workdir or Path("runs") / config.name
    host_memory.keep_freed()
    compilation.use_persistent_cache("")
    with processes.joined(arguments.coordinator, arguments.num_processes, arguments.process_id):
        return stages.run(config, folder, command=command.line())


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    result.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        default="configs/pipelines/r1_tiny.py",
        help="config file of a pipeline (default: %(default)s)",
    )
    result.add_argument(
        "--set",
        metavar="STAGE.KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change keys of a stage's config, e.g. reasoning.train.steps=20; repeatable",
    )
    result.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the game and of every stage (default: those of the config)",
    )
    result.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="folder of the pipeline (default: runs/<name of the config>)",
    )
    command.add_processes(result)
    return result


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

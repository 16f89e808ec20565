"""Trains a model, or resumes a stopped run.

  # the tiny model on the embedded text, in runs/tiny
  python tools/train.py
  # a shorter run with another seed, in a folder of its own
  python tools/train.py configs/tiny.py --set train.steps=300 train.seed=1 --workdir runs/seed1
  # your own text
  python tools/train.py configs/small.py --workdir runs/books --set data.files='books/*.jsonl.gz'
  # begin with a checkpoint: train an indexer for a dense model, then all together (docs/sparse.md)
  python tools/train.py configs/sparse_tiny.py --init runs/tiny --workdir runs/indexer \\
      --set train.indexer=warmup
  python tools/train.py configs/sparse_tiny.py --init runs/indexer --workdir runs/sparse
  # the first of two processes; the other one has --process-id 1 (docs/several_hosts.md)
  python tools/train.py --coordinator node1:9876 --num-processes 2 --process-id 0
  # resume a stopped run with the config that it keeps
  python tools/train.py runs/books --workdir runs/books

The same command, given again, resumes from the newest checkpoint. Ctrl-C or SIGTERM finishes the
step, saves and stops; a second one stops at once. Exit codes: 0 finished, 1 failed, 2 wrong usage,
130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from dsjax import command


def execute(arguments: argparse.Namespace) -> int:
    config = command.load(arguments)
    if arguments.init:
        config = dataclasses.replace(config, init=arguments.init)
    folder = arguments.workdir or Path("runs") / config.name
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.parallel import compilation, processes
    from dsjax.train import host_memory, pretraining

    host_memory.keep_freed()
    compilation.use_persistent_cache(config.data.cache_dir)
    with processes.joined(arguments.coordinator, arguments.num_processes, arguments.process_id):
        return pretraining.train(config, folder, command=command.line())


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_config(result, default="configs/tiny.py")
    command.add_initial(result)
    command.add_processes(result)
    return result


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

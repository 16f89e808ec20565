"""Trains a checkpoint on preferences (DPO), or makes a reward model of it; resumes a stopped run.

CKPT is a Hugging Face folder, a folder imported by tools/convert.py, or the folder of a run.

  # DPO on your own pairs, in runs/preferred
  python tools/prefer.py configs/dpo_tiny.py --init runs/chat --workdir runs/preferred \\
      --set preference.files='pairs/*.jsonl'
  # a reward model from the same pairs (Bradley-Terry), with R1's figures
  python tools/prefer.py configs/reward_v3.py --init DeepSeek-V3 --workdir runs/helpful \\
      --set preference.files=helpful.jsonl.zst
  # a reward model from single answers, each labelled good or bad
  python tools/prefer.py configs/dpo_tiny.py --init runs/chat --workdir runs/safe \\
      --set preference.kind=pointwise preference.files=safe.jsonl
  # resume a stopped run with the config that it keeps
  python tools/prefer.py runs/preferred --workdir runs/preferred

A line of a file is {"prompt": "...", "chosen": "...", "rejected": "..."}, each a text or messages,
or for pointwise {"prompt": "...", "completion": "...", "label": true}; .jsonl, .jsonl.gz,
.jsonl.zst and .parquet are read. A run of DPO is a run like any other: tools/score.py, generate.py,
evaluate.py and convert.py export take its folder. A reward model's run is a reward for
tools/grpo.py, sample.py and evaluate.py.

The same command, given again, resumes from the newest checkpoint. Ctrl-C or SIGTERM finishes the
step, saves and stops; a second one stops at once. Exit codes: 0 finished, 1 failed, 2 wrong usage,
130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import sys

from dsjax import command
from dsjax.config.preference import Preference


def execute(arguments: argparse.Namespace) -> int:
    config, folder = command.load_initial(arguments, Preference)
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.parallel import compilation, processes
    from dsjax.posttrain import preferring
    from dsjax.train import host_memory

    host_memory.keep_freed()
    compilation.use_persistent_cache("")
    with processes.joined(arguments.coordinator, arguments.num_processes, arguments.process_id):
        return preferring.train(config, folder, command=command.line())


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_config(result, default="configs/dpo_tiny.py", kinds=(Preference,))
    command.add_initial(result)
    command.add_processes(result)
    return result


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

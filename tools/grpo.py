r"""Trains a model by reinforcement: it answers questions, answers are judged, better ones get
likelier. GRPO as DeepSeekMath and R1 print it, and its relatives by options (rl.*).

  # the countdown game, from a fine-tuned toy
  python tools/grpo.py configs/grpo_countdown.py --init runs/cold_start --workdir runs/zero
  # your own questions and rewards, shorter, another seed
  python tools/grpo.py configs/grpo_countdown.py --init runs/cold_start --workdir runs/mine \
      --set rl.problems='mine/*.jsonl' rl.rewards=math,format train.steps=50 train.seed=1
  # DAPO instead of GRPO
  python tools/grpo.py configs/grpo_countdown.py --init runs/cold_start --workdir runs/dapo \
      --set rl.average=token rl.epsilon_high=0.28 rl.beta=0
  # resume a stopped run with the config that it keeps
  python tools/grpo.py runs/zero --workdir runs/zero

Questions are lines {"prompt": ..., "answer": ...} and whatever the rewards read (docs/rewards.md).
samples.jsonl in the run's folder shows what the model says, metrics.jsonl how it fares. The same
command, given again, resumes from the newest checkpoint. Ctrl-C or SIGTERM finishes the step, saves
and stops. Exit codes: 0 finished, 1 failed, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import sys

from dsjax import command
from dsjax.config.reinforcement import Reinforcement


def execute(arguments: argparse.Namespace) -> int:
    config, folder = command.load_initial(arguments, Reinforcement)
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.parallel import compilation, processes
    from dsjax.posttrain import reinforcement
    from dsjax.train import host_memory

    host_memory.keep_freed()
    compilation.use_persistent_cache("")
    with processes.joined(arguments.coordinator, arguments.num_processes, arguments.process_id):
        return reinforcement.learn(config, folder, command=command.line())


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_config(result, default="configs/grpo_countdown.py", kinds=(Reinforcement,))
    command.add_initial(result)
    command.add_processes(result)
    return result


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

"""Samples many answers per prompt, judges and filters them, and writes them as training data.

CKPT is a Hugging Face folder, a folder imported by tools/convert.py, or the folder of a run.

  # rejection sampling as in R1's recipe: 16 answers per prompt, the right ones kept
  python tools/sample.py runs/reasoning --prompts problems.jsonl --out sft.jsonl --n 16
  # a teacher's best answer to each prompt, by a reward model
  python tools/sample.py DeepSeek-R1 --prompts 'prompts/*.jsonl' --out best.jsonl \\
    --reward model:runs/helpfulness --keep best --mesh expert=8 --max-new-tokens 8192
  # then train on them
  python tools/sft.py --init runs/base --set sft.files=sft.jsonl

FILE.jsonl gets {"messages": ...} lines, or {"prompt", "completion"} for a base model. Dropped are
answers that are cut off, wrong, in mixed languages, repetitive or duplicates; a table tells how
many. A stopped command, given again, goes on where it was, and ends with the same file. Rewards and
the fields that they read: docs/rewards.md. Exit codes: 0 finished, 1 failed, 2 wrong usage, 130
Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsjax import command


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_checkpoint(result)
    add = result.add_argument
    add("--prompts", metavar="FILE", required=True, help="file or glob of problems")
    add("--out", metavar="FILE.jsonl", type=Path, required=True, help="training data to write")
    add("--n", metavar="N", type=int, default=16, help="samples per prompt (default: %(default)s)")
    add("--reward", metavar="NAME", default="rule", help="what judges (default: %(default)s)")
    keep = "right: worth 1 or more; best: one per prompt; all (default: %(default)s)"
    add("--keep", choices=("right", "best", "all"), default="right", help=keep)
    add("--max-new-tokens", metavar="N", type=int, help="at most per sample (default: 2048)")
    add("--temperature", metavar="T", type=float, help="default: the checkpoint's, else 1")
    add("--top-p", metavar="P", type=float, help="keep the most likely that sum to P")
    add("--seed", metavar="S", type=int, default=0, help="of sampling (default: 0)")
    add("--max-batch", metavar="N", type=int, default=64, help="samples at a time (default: 64)")
    add("--system", metavar="TEXT", default="", help="instructions before each prompt")
    add("--template", metavar="TEXT", default="", help="text around each {prompt}")
    add("--raw", action="store_true", help="give prompts as plain text, without a chat format")
    return result


def execute(arguments: argparse.Namespace) -> None:
    if arguments.n < 1:
        parser().error("--n is at least 1")
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.parallel import compilation
    from dsjax.posttrain import rejection

    compilation.use_persistent_cache("")
    rejection.run(rejection.Order.of(arguments))


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

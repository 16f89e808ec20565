"""Measures how well a checkpoint finds facts in long texts, by length and by depth.

CKPT is a Hugging Face folder, a folder imported by tools/convert.py, or the folder of a run.

  # a fact in a haystack of text, at nine depths of 20 texts of each length; with a heat map
  python tools/recall.py DeepSeek-V2-Lite --lengths 1024 4096 16384 --png needle.png
  # numbers by name, one a line: every line is a fact; your own lengths, depths and seed
  python tools/recall.py DeepSeek-R1-Distill-Qwen-1.5B --task pairs --lengths 4096,32768 \\
    --depths 5 --n 10 --seed 1 --json recall.json
  # pairs of bare ids, for a model that was trained on such (docs/long_context.md)
  python tools/recall.py runs/recall_4096 --task tokens --lengths 256,1024,4096

A text has a fact at every depth and is read once for all its questions, which the model continues
greedily, without a chat format. A length counts the question and the answer. needle hides its facts
in --text FILE (.txt, .jsonl, .parquet), by default in the source code of Python's standard library.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsjax import command


def lengths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of lengths, such as 1024,4096")
    return [int(part) for part in parts]


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_checkpoint(result)
    add = result.add_argument
    kinds = ("needle", "pairs", "tokens")
    add("--task", choices=kinds, default="needle", help="what is hidden (default: %(default)s)")
    help_lengths = "tokens of a text, question and answer (default: 1024,4096)"
    add(
        "--lengths",
        metavar="N,...",
        type=lengths,
        nargs="+",
        default=[[1024, 4096]],
        help=help_lengths,
    )
    add("--depths", metavar="D", type=int, default=9, help="facts per text (default: %(default)s)")
    add("--n", metavar="N", type=int, default=20, help="texts per length (default: %(default)s)")
    add("--seed", metavar="S", type=int, default=0, help="of texts and facts (default: 0)")
    add("--text", metavar="FILE", nargs="+", default=(), help="files or globs to hide needles in")
    add("--max-batch", metavar="N", type=int, default=8, help="prompts at a time (default: 8)")
    add("--json", metavar="F", help="write the figures here; - prints them instead")
    add("--png", metavar="F.png", type=Path, help="draw recall over length and depth here")
    return result


def execute(arguments: argparse.Namespace) -> None:
    arguments.lengths = sorted({length for part in arguments.lengths for length in part})
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.parallel import compilation
    from dsjax.posttrain import recall

    compilation.use_persistent_cache("")
    recall.run(recall.Search.of(arguments))


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

"""Measures how many questions about pictures a model answers rightly, by rules.

CKPT is a folder of Janus, Janus-Pro or DeepSeek-VL, or `model/` of a run of tools/paint.py.

  # MMMU, with its pictures in the tables
  python tools/examine.py Janus-Pro-1B --questions 'MMMU/*/validation*.parquet' --json mmmu.json
  # GQA: questions by their ids, pictures in a folder
  python tools/examine.py Janus-Pro-1B --questions testdev_balanced_questions.json --images images/
  # your own: {"image": "cat.png", "question": "What animal is it?", "answer": ["cat", "a kitten"]}
  python tools/examine.py runs/three/model --questions asked.jsonl

Replies are greedy. An option counts if its letter or its text is given, a short answer if it is one
of the right ones, without regard to case, punctuation and articles. The interval is Wilson's.
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
    add("--questions", metavar="FILES", required=True, help="files, globs or folders of questions")
    add("--images", metavar="DIR", type=Path, help="folder of pictures (default: the file's own)")
    add("--max-new-tokens", metavar="N", type=int, default=32, help="of a reply (default: 32)")
    add("--max-batch", metavar="N", type=int, default=16, help="questions at a time (default: 16)")
    add("--json", metavar="F", help="write figures and every reply here; - prints them instead")
    return result


def execute(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1 or arguments.max_batch < 1:
        parser().error("--max-new-tokens and --max-batch are at least 1")
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.janus import examination
    from dsjax.parallel import compilation

    compilation.use_persistent_cache("")
    examination.run(arguments)


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

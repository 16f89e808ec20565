"""Continues a text, answers a prompt or chats, with any checkpoint.

CKPT is a Hugging Face folder, a folder imported by tools/convert.py, or the folder of a run.

  # chat; the thought of a reasoning model is shown dim
  python tools/generate.py DeepSeek-V2-Lite-Chat
  # one answer, greedily, with the model's own multi-token prediction for speed
  python tools/generate.py DeepSeek-V3 --prompt 'Why is the sky blue?' --temperature 0 --speculative
  # a question about a picture; DeepSeek-VL2 also says where: --prompt '<|ref|>the cat<|/ref|>'
  python tools/generate.py Janus-Pro-1B --image cat.png --prompt 'What is this?' --temperature 0
  # a base model continues the text
  python tools/generate.py runs/tiny --prompt 'def main(' --max-new-tokens 100 --stop 'def '
  # token ids [batch, length] in, exactly 64 new ones per row out, for comparisons
  python tools/generate.py runs/tiny --tokens P.npy --out O.npy --max-new-tokens 64 --temperature 0

Sampling settings default to the checkpoint's generation_config.json, else to temperature 1 alone.
Continued text starts with the begin token unless tokenizer_config.json says "add_bos_token": false.
With --tokens no token ends a row early. Without --dtype a CPU computes in float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsjax import command

TEXT_ONLY = ("stop", "raw", "thinking", "no_bos", "image", "boxes")


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_checkpoint(result)
    what = result.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="what to answer, or to continue")
    what.add_argument("--tokens", metavar="P.npy", type=Path, help="continue these ids; with --out")
    result.add_argument("--image", metavar="A.png", type=Path, nargs="+", help="pictures to show")
    result.add_argument("--boxes", metavar="B.png", type=Path, help="draw the places it names here")
    result.add_argument("--out", metavar="O.npy", type=Path, help="int32 [batch, N] new ids")
    result.add_argument("--max-new-tokens", metavar="N", type=int, help="at most (default: 2048)")
    result.add_argument("--temperature", metavar="T", type=float, help="0 takes the most likely")
    result.add_argument("--top-k", metavar="K", type=int, help="keep the K most likely; 0: all")
    result.add_argument("--top-p", metavar="P", type=float, help="the most likely that sum to P")
    result.add_argument("--min-p", metavar="P", type=float, help="drop below P times the maximum")
    result.add_argument("--seed", metavar="S", type=int, default=0, help="of sampling (default: 0)")
    result.add_argument(
        "--stop", metavar="STRING", action="append", help="end the reply before this; repeatable"
    )
    result.add_argument("--raw", action="store_true", help="continue --prompt without chat format")
    result.add_argument("--thinking", action=argparse.BooleanOptionalAction, help="think first")
    result.add_argument("--no-bos", action="store_true", help="start without the begin token")
    result.add_argument(
        "--speculative", action="store_true", help="draft with the model's own MTP modules"
    )
    return result


def execute(arguments: argparse.Namespace) -> None:
    if (arguments.tokens is None) != (arguments.out is None):
        parser().error("--tokens P.npy and --out O.npy go together")
    given = {name: getattr(arguments, name) for name in TEXT_ONLY}
    if arguments.tokens and any(each not in (None, False) for each in given.values()):
        parser().error(
            "--stop, --raw, --thinking, --no-bos, --image, --boxes are for text, not for --tokens"
        )
    if arguments.raw and arguments.prompt is None:
        parser().error("--raw needs a --prompt to continue")
    if (most := arguments.max_new_tokens) is not None and most < 1:
        parser().error(f"--max-new-tokens {most} is not at least 1")
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.infer import console
    from dsjax.parallel import compilation

    compilation.use_persistent_cache("")
    console.run(arguments)


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

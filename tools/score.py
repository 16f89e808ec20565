"""Scores text or tokens under a checkpoint, and writes raw logits.

CKPT is a Hugging Face folder, a folder imported by tools/convert.py, or the folder of a run.

  # loss, perplexity and bits per byte of some text (.txt, .jsonl, .parquet, also .gz and .zst)
  python tools/score.py runs/tiny --text notes.txt 'books/*.jsonl.gz'
  # raw logits of given token ids [batch, length], for comparisons with other programs
  python tools/score.py DeepSeek-V2-Lite --tokens T.npy --logits L.npy --dtype float32
  # logits after pictures, which fill the placeholders in T.npy in order
  python tools/score.py Janus-Pro-1B --tokens T.npy --image cat.png --logits L.npy
  # the logits of V3's multi-token prediction module too, on eight devices
  python tools/score.py DeepSeek-V3 --tokens T.npy --logits L.npy --mtp-logits M.npy --mesh tensor=8

A document is scored after the begin token, or after the end token with --no-bos or if
tokenizer_config.json says "add_bos_token": false. Without --dtype a CPU computes in float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsjax import command


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_checkpoint(result)
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", nargs="+", help="files or globs of text to score")
    what.add_argument("--tokens", metavar="T.npy", type=Path, help="token ids [batch, length]")
    add = result.add_argument
    add("--logits", metavar="L.npy", type=Path, help="write float32 [batch, length, vocab] here")
    what = result.add_mutually_exclusive_group()
    what.add_argument("--image", metavar="FILE", type=Path, nargs="+", help="pictures of T.npy")
    help_pixels = "the same, pre-processed: float32 [n, 3, S, S]"
    what.add_argument("--pixels", metavar="P.npy", type=Path, help=help_pixels)
    add("--high-pixels", metavar="H.npy", type=Path, help="the same for a model's second tower")
    help_mtp = "write float32 [batch, length-1, vocab] here; entry i predicts token i+2"
    add("--mtp-logits", metavar="M.npy", type=Path, help=help_mtp)
    help_length = "tokens per window of text (default: 4096, or the model's limit if lower)"
    add("--sequence-length", metavar="N", type=int, default=0, help=help_length)
    add("--text-field", metavar="NAME", help="field or column of the text (default: text)")
    add("--no-bos", action="store_true", help="start documents from the end token instead")
    command.add_json(result)
    return result


def execute(arguments: argparse.Namespace) -> None:
    if arguments.text and (arguments.logits or arguments.mtp_logits):
        parser().error("--logits and --mtp-logits go with --tokens")
    if arguments.text and (arguments.image or arguments.pixels or arguments.high_pixels):
        parser().error("--image, --pixels and --high-pixels go with --tokens")
    if arguments.high_pixels and not arguments.pixels:
        parser().error("--high-pixels goes with --pixels")
    if arguments.tokens and (arguments.sequence_length or arguments.text_field or arguments.no_bos):
        parser().error("--sequence-length, --text-field and --no-bos go with --text")
    # --help and wrong usage need not wait for jax.
    from dsjax.infer import score
    from dsjax.parallel import compilation

    compilation.use_persistent_cache("")
    score.run(arguments)


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

"""Scores text or tokens under a checkpoint, and writes raw logits.

CKPT is a Hugging Face folder, a folder imported by tools/convert.py, or the folder of a run.

  # loss, perplexity and bits per byte of some text (.txt, .jsonl, .parquet, also .gz and .zst)
  python tools/score.py runs/tiny --text notes.txt 'books/*.jsonl.gz'
  # raw logits of given token ids [batch, length], for comparisons with other programs
  python tools/score.py DeepSeek-V2-Lite --tokens T.npy --logits L.npy --dtype float32
  # the logits of V3's multi-token prediction module too, on eight devices
  python tools/score.py DeepSeek-V3 --tokens T.npy --logits L.npy --mtp-logits M.npy --mesh tensor=8

A document is scored after the begin token, or after the end token with --no-bos or if
tokenizer_config.json says "add_bos_token": false. Without --dtype a CPU computes in float32.
"""

from __future__ import annotations

import argparse
import json
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
    if arguments.tokens and (arguments.text_field or arguments.no_bos):
        parser().error("--text-field and --no-bos go with --text")
    # --help and wrong usage need not wait for jax.
    from rich.console import Console

    from dsjax.checkpoint.load import open_checkpoint
    from dsjax.display import Display
    from dsjax.infer import score
    from dsjax.infer.windows import TextFiles
    from dsjax.parallel import compilation
    from dsjax.parallel.mesh import submesh

    compilation.use_persistent_cache("")
    field, no_bos = arguments.text_field or "text", arguments.no_bos
    result = score.score_files(
        open_checkpoint(arguments.checkpoint, dict(arguments.override)),
        text=arguments.text and TextFiles(arguments.text, field, not no_bos),
        tokens=arguments.tokens,
        outputs=score.Outputs(arguments.logits, arguments.mtp_logits),
        length=arguments.sequence_length,
        dtype=arguments.dtype,
        mesh=submesh(arguments.mesh),
        progress=Display(Console(stderr=True)).counting("scoring"),
    )
    figures = result.figures()
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<14}{value:{',' if isinstance(value, int) else ',.4f'}}")


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

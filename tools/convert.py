"""Converts checkpoints between Hugging Face's folders, ours and GGUF files, and describes them.

  # a published checkpoint, FP8 or bfloat16, into a folder that loads on any mesh
  python tools/convert.py import deepseek-ai/DeepSeek-V3 converted/v3
  # a trained model, for transformers, vLLM, SGLang and llama.cpp's converter
  python tools/convert.py export runs/tiny published/tiny --dtype bfloat16 --push me/tiny
  python tools/convert.py export DeepSeek-V3 v3.gguf --type 'experts=Q4_0,*=Q8_0'
  # what config.json alone implies: shapes, number of tensors, bytes; needs no weights
  python tools/convert.py inspect DeepSeek-V3/config.json --expect

DST appears when it is whole; until then DST.partial holds the work, and the same command resumes
it. Exit codes: 0 finished, 1 failed, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from dsjax import command

_COMMANDS = {
    "import": "Hugging Face folder or GGUF file -> ours",
    "export": "the way back; any checkpoint -> GGUF file, for llama.cpp and ollama",
    "inspect": "family, shapes, tensors and bytes, found and expected",
}
_DTYPES = ("keep", "bfloat16", "float32", "fp8")
_NEXT = {"import": "python tools/generate.py", "export": "python tools/convert.py inspect"}


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    importing, exporting, inspecting = command.add_commands(result, _COMMANDS).values()
    for sub in (importing, exporting):
        sub.add_argument("source", metavar="SRC", type=Path, help="the checkpoint to convert")
        sub.add_argument("target", metavar="DST", type=Path, help="a new folder, or F.gguf")
        sub.add_argument("--dtype", choices=_DTYPES, default="keep", help="default: keep")
    exporting.add_argument("--type", metavar="T", help="of DST.gguf: Q8_0 ...; see docs/gguf.md")
    exporting.add_argument("--push", metavar="OWNER/NAME", help="upload DST to this repository")
    inspecting.add_argument("source", metavar="SRC", type=Path, help="checkpoint, or a config.json")
    inspecting.add_argument("--expect", action="store_true", help="look at config.json alone")
    command.add_json(inspecting)
    command.add_overrides(importing)
    command.add_overrides(inspecting)
    return result


def execute(arguments: argparse.Namespace) -> None:
    # Conversion runs on the host. Without this, jax would claim the accelerators.
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    from rich.console import Console

    from dsjax import tables
    from dsjax.checkpoint import exporting, importing, inspection
    from dsjax.display import Transfer

    if arguments.command == "inspect":
        given = arguments.source, arguments.expect, dict(arguments.override)
        summary = inspection.summarize(*given)
        return tables.show(summary, inspection.print_summary, arguments.json)
    exports, target = arguments.command == "export", arguments.target
    more: Any = {"choice": arguments.type, "push": arguments.push} if exports else {}
    more |= {} if exports else {"overrides": dict(arguments.override)}
    convert = exporting.export if exports else importing.import_checkpoint
    with Transfer(Console()) as progress:
        done = convert(arguments.source, target, dtype=arguments.dtype, progress=progress, **more)
        then = command.as_called(f"{_NEXT[arguments.command]} {shlex.quote(str(target))}")
        progress.say(f"{done}; all in {target}\nnext: {then}")


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

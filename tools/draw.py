"""Draws pictures of a prompt, with a model that can: Janus, Janus-Pro or JanusFlow.

CKPT is the folder as published, DeepSeek's own or transformers' conversion of it. JanusFlow needs a
VAE besides, the folder of stabilityai/sdxl-vae.

  # four pictures and a sheet of them all
  python tools/draw.py Janus-Pro-1B --prompt 'a lighthouse at dusk, oil painting' --out lighthouse
  # one picture, the likeliest codes, following the prompt more loosely
  python tools/draw.py Janus-Pro-7B --prompt 'a red circle' --out one --n 1 --temperature 0 \\
    --guidance 2
  # prompt ids [batch, length] in; float32 [batch, H, W, 3], -1 to 1, and codes out
  python tools/draw.py Janus-Pro-1B --tokens T.npy --out O.npy --codes C.npy --temperature 0
  # by a rectified flow
  python tools/draw.py JanusFlow-1.3B --vae sdxl-vae --prompt 'a lighthouse at dusk' --out flow

A picture is DIR/SEED.png, and its metadata says prompt, model and settings. The next has the next
seed. A stopped command, given again, draws what is left. Without --dtype a CPU computes in float32.
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
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="what to draw")
    what.add_argument("--tokens", metavar="T.npy", type=Path, help="draw for these prompt ids")
    add("--out", metavar="DIR", type=Path, required=True, help="folder of the pictures, or O.npy")
    add("--codes", metavar="C.npy", type=Path, help="with --tokens: int32 [batch, codes]")
    add("--n", metavar="N", type=int, help="how many of --prompt (default: 4)")
    guidance = "how much to exaggerate what the prompt changes; 1: not (default: 5; of a flow: 2)"
    add("--guidance", metavar="W", type=float, help=guidance)
    temperature = "of drawing codes; 0 takes the likeliest (default: 1)"
    add("--temperature", metavar="T", type=float, help=temperature)
    add("--steps", metavar="N", type=int, help="of a flow (default: 30)")
    add("--vae", metavar="FOLDER", type=Path, help="what makes pixels of a flow's latents")
    add("--seed", metavar="S", type=int, default=0, help="of the first picture (default: 0)")
    add("--max-batch", metavar="N", type=int, default=16, help="of --prompt at once (default: 16)")
    return result


def execute(arguments: argparse.Namespace) -> None:
    if arguments.prompt is not None and arguments.codes:
        parser().error("--codes goes with --tokens")
    if arguments.tokens and arguments.n is not None:
        parser().error("--n goes with --prompt; of --tokens each row is one picture")
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.infer import drawing, drawn_tokens
    from dsjax.parallel import compilation

    compilation.use_persistent_cache("")
    (drawn_tokens if arguments.tokens else drawing).run(arguments)


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

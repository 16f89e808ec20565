"""Draw a pipeline schedule; print its bubble, its peak activations and what each rank does.

No device is used. Times are those of one chunk: a forward takes 1, a backward 2.

examples:
  python tools/plan.py --schedule dualpipe --stages 8 --microbatches 20 --out dualpipe.png
  python tools/plan.py --schedule zb1p --stages 4 --microbatches 8 --json
"""

import argparse
import json
import sys
from pathlib import Path

from dsjax import command


def make_parser() -> argparse.ArgumentParser:
    parser = command.make_parser(__doc__)
    parser.add_argument(
        "--schedule",
        metavar="NAME",
        required=True,
        help="gpipe, 1f1b, interleaved, zb1p, dualpipe or dualpipev",
    )
    parser.add_argument(
        "--stages",
        metavar="P",
        type=int,
        required=True,
        help="pieces that the model is cut into; interleaved and dualpipev put two on a rank",
    )
    parser.add_argument(
        "--microbatches",
        metavar="M",
        type=int,
        required=True,
        help="micro-batches of a step, in DualPipe those of both directions",
    )
    parser.add_argument(
        "--out", metavar="F.png", type=Path, help="draw the schedule into this file"
    )
    parser.add_argument(
        "--json",
        metavar="F",
        nargs="?",
        const="-",
        help="write one JSON object into this file; without a file, print it and nothing else",
    )
    return parser


def execute(arguments: argparse.Namespace) -> None:
    from dsjax.parallel import schedules

    schedule = schedules.build(arguments.schedule, arguments.stages, arguments.microbatches)
    from rich.console import Console

    from dsjax.plan import drawing, pipeline

    summary = pipeline.summarize(schedule)
    text = json.dumps(summary, indent=2) + "\n"
    if arguments.out:
        with command.writing(arguments.out):
            drawing.draw(schedule, arguments.out)
    if arguments.json == "-":
        sys.stdout.write(text)
        return
    if arguments.json:
        with command.writing(arguments.json):
            Path(arguments.json).write_text(text)
    pipeline.print_summary(summary, Console())


if __name__ == "__main__":
    sys.exit(command.run(make_parser(), execute))

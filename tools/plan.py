"""Plan a step on a TPU slice, or draw a pipeline schedule. No TPU is used.

CONFIG with --topology compiles the real programs of a training step with the TPU compiler (extra
`plan`) and prints what it says of each: memory of a device, whether it fits, FLOPs, collectives,
how fast it can be at best. --no-compile estimates the same by arithmetic, for slices of any size,
in seconds. Reinforcement learning trains, scores (log-probabilities of the policy that answered and
of the reference) and decodes. An experiment that begins with a checkpoint takes its model from
--init. --schedule prints a pipeline's bubble, its peak activations and what each rank does, a
forward of one chunk taking 1 and a backward 2.

examples:
  python tools/plan.py configs/v3_671b.py --topology v5p:8x8x8 --json v3.json
  python tools/plan.py configs/v2_lite.py --topology v5e:4x4 --set train.batch_size=16 \\
      train.micro_batch_size=16
  python tools/plan.py configs/v3_671b.py --topology v5p:16x16x16 --no-compile
  python tools/plan.py configs/r1_zero_v3.py --init configs/v3_671b.py --topology v5p:8x8x8
  python tools/plan.py --schedule dualpipe --stages 8 --microbatches 20 --out dualpipe.png
"""

import argparse
import os
import sys
from pathlib import Path

from dsjax import command
from dsjax.config.roots import PLANNED

STEP_ONLY = ("config", "set", "init", "topology", "step", "no_compile")
SCHEDULE_ONLY = ("schedule", "stages", "microbatches", "out")


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_experiment(result, optional=True, kinds=PLANNED)
    add = result.add_argument
    add("--topology", metavar="NAME", help="generation and shape in chips, such as v5p:8x8x8")
    text = "one program alone (default: all that a training step runs)"
    add("--step", choices=("train", "score", "decode"), help=text)
    add("--no-compile", action="store_true", help="estimate without the compiler")
    add("--schedule", metavar="NAME", help="gpipe, 1f1b, interleaved, zb1p, dualpipe, dualpipev")
    add(
        "--stages",
        metavar="P",
        type=int,
        help="pieces that the model is cut into; interleaved and dualpipev put two on a rank",
    )
    add("--microbatches", metavar="M", type=int, help="of a step, DualPipe's of both directions")
    add("--out", metavar="F.png", type=Path, help="draw the schedule into this file")
    text = "write one JSON object into this file; without a file, print it and nothing else"
    add("--json", metavar="F", nargs="?", const="-", help=text)
    return result


def execute(arguments: argparse.Namespace) -> None:
    from dsjax import tables

    tables.check(arguments.json)
    if arguments.schedule:
        command.require(parser(), arguments, ("stages", "microbatches"), without=STEP_ONLY)
        from dsjax.plan import pipeline

        asked = arguments.schedule, arguments.stages, arguments.microbatches, arguments.out
        summary, show = pipeline.plan(*asked), pipeline.print_summary
    else:
        command.require(parser(), arguments, ("config", "topology"), without=SCHEDULE_ONLY)
        config = command.load_experiment(arguments, PLANNED)
        os.environ["JAX_PLATFORMS"] = "cpu"  # no device takes part, so that none is looked for
        from dsjax.checkpoint.shape import with_shape

        config = with_shape(config, arguments.init)
        from dsjax.plan import figures, topology

        slice_, compiled = topology.parse(arguments.topology), not arguments.no_compile
        summary = figures.of_step(config, slice_, arguments.step, compiled=compiled)
        show = figures.print_step
    tables.show(summary, show, arguments.json)


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

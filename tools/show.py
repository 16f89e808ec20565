"""Prints a config's keys, what a step takes, parameters, counts, FLOPs, cache size and sharding,
and, if no mesh axis is open, what one device holds.

CONFIG is an experiment of any kind, but for those of models that see (tools/plan.py). One that
begins with a checkpoint takes its model from there: --init names it, or a config of the same model.
No device is used; 671B parameters take seconds on any machine.

examples:
  python tools/show.py configs/tiny.py
  python tools/show.py configs/v3_671b.py --set data.sequence_length=8192 mesh.tensor=8
  python tools/show.py configs/v3_671b.py --mesh fsdp=8,expert=64
  python tools/show.py configs/v2_lite.py --json
  python tools/show.py configs/r1_zero_v3.py --init configs/v3_671b.py
"""

import argparse
import sys

from dsjax import command


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_experiment(result)
    command.add_mesh(result)
    command.add_json(result)
    return result


def execute(arguments: argparse.Namespace) -> None:
    config = command.on_mesh(command.load_experiment(arguments), arguments.mesh)
    from dsjax import show, tables
    from dsjax.checkpoint.shape import with_shape

    config = with_shape(config, arguments.init)
    tables.show(show.summarize(config), show.print_summary, arguments.json)


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

"""Prints a config's keys, parameters, counts, FLOPs, cache size and sharding, and with --mesh what
one device holds.

No device is used; 671B parameters take seconds on any machine.

examples:
  python tools/show.py configs/tiny.py
  python tools/show.py configs/v3_671b.py --set data.sequence_length=8192 mesh.tensor=8
  python tools/show.py configs/v3_671b.py --mesh fsdp=8,expert=64
  python tools/show.py configs/v2_lite.py --json
"""

import argparse
import sys

from dsjax import command


def make_parser() -> argparse.ArgumentParser:
    parser = command.make_parser(__doc__)
    command.add_config(parser)
    command.add_mesh(parser)
    command.add_json(parser)
    return parser


def execute(arguments: argparse.Namespace) -> None:
    config = command.on_mesh(command.load(arguments), arguments.mesh)
    from dsjax import show, tables

    tables.show(show.summarize(config), show.print_summary, arguments.json)


if __name__ == "__main__":
    sys.exit(command.run(make_parser(), execute))

"""Verifies, lists and compares checkpoints, of runs or converted, by their manifests.

  # every byte of the newest checkpoint of a run, of one of its steps, of a converted folder
  python tools/checkpoint.py verify runs/tiny
  python tools/checkpoint.py verify runs/tiny/checkpoints/300
  python tools/checkpoint.py verify converted/v3
  # the checkpoints of a run, and whether each is as it was written
  python tools/checkpoint.py list runs/tiny
  # arrays and records that differ
  python tools/checkpoint.py compare runs/tiny/checkpoints/200 runs/tiny/checkpoints/300

Exit codes: 0 whole, or equal; 1 damaged, or different; 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dsjax import command


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    commands = command.add_commands(
        result,
        {
            "verify": "check every byte of a checkpoint",
            "list": "the checkpoints of a run, with size, time and state",
            "compare": "what differs between two checkpoints",
        },
    )
    for name, sub in commands.items():
        sub.add_argument("path", metavar="RUN" if name == "list" else "CKPT", type=Path)
        command.add_json(sub)
    commands["compare"].add_argument("other", metavar="OTHER", type=Path)
    return result


def execute(arguments: argparse.Namespace) -> int:
    from dsjax.checkpoint import audit

    if arguments.command == "verify":
        found = audit.verify(arguments.path)
        text = audit.describe(found)
    elif arguments.command == "list":
        found = audit.survey(arguments.path)
        text = "\n".join(map(audit.describe, found["checkpoints"])) or "no checkpoints"
    else:
        found = audit.compare(arguments.path, arguments.other)
        text = "\n".join(found["differences"]) or "the same arrays, the same record"
    print(json.dumps(found, indent=2) if arguments.json else text)
    return command.SUCCESS if found["fine"] else command.FAILURE


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

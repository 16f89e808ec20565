"""The command `dsjax`: every tool of `tools/` under its name, wherever the package is installed.

dsjax train                        the same as python tools/train.py, in any folder
dsjax train small --set ...        a config that comes with the package, by its name
dsjax completion bash > F          what completes its arguments, once a shell has read it
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dsjax import __version__, command, settings

TOOLS = (
    "train", "sft", "prefer", "grpo", "sample", "evaluate", "recall", "r1", "paint", "examine",
    "shapes", "generate", "draw", "serve", "score", "convert", "checkpoint", "show", "plan",
    "prepare", "mine",
)  # fmt: skip
_SHELLS = ("bash", "zsh", "tcsh")


def main() -> int:
    """Runs the tool that the first argument names; returns its exit code."""
    name, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name not in TOOLS:
        return command.run(_parser(), _complete)
    sys.argv = [f"{command.PROGRAM} {name}", *rest]
    tool = _tool(name)
    return command.run(tool.parser(), tool.execute)


def _tool(name: str) -> ModuleType:
    """Imports a tool, which imports nothing heavy before it runs."""
    path = settings.packaged(Path("tools", f"{name}.py"))
    spec = path and importlib.util.spec_from_file_location(f"dsjax.tools.{name}", path)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def _summary(tool: ModuleType) -> str:
    """Returns the first sentence of a tool's description."""
    return (tool.__doc__ or "").partition("\n\n")[0].replace("\n", " ").partition(". ")[0]


def _parser(*, complete: bool = False) -> argparse.ArgumentParser:
    """Returns the parser of `dsjax` itself.

    Args:
      complete: whether the tools' own arguments are in it, which takes a moment.
    """
    result = command.make_parser("The DeepSeek family in JAX. Each command explains itself: --help")
    result.prog = command.PROGRAM
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in TOOLS:
        tool = _tool(name)
        own = [tool.parser()] if complete else []
        commands.add_parser(name, help=_summary(tool), parents=own, add_help=False)
    completion = commands.add_parser("completion", help="Prints what completes arguments.")
    completion.add_argument("shell", choices=_SHELLS)
    return result


def _complete(arguments: argparse.Namespace) -> None:
    """Prints the completion of a shell."""
    import shtab

    print(shtab.complete(_parser(complete=True), arguments.shell))


if __name__ == "__main__":
    sys.exit(main())

"""What all commands share: arguments, exit codes, and one clear message on failure.

A tool parses its arguments before it imports anything heavy, so `--help` and wrong usage answer at
once:

    def execute(arguments):
        from dsjax.train import pretraining
        pretraining.train(command.load(arguments), ...)

    if __name__ == "__main__":
        parser = command.make_parser(__doc__)
        command.add_config(parser)
        sys.exit(command.run(parser, execute))
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import errno
import gc
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from dsjax import files, settings, signals, unknown_arguments
from dsjax.axes import AXES, CHECKPOINT_AXES
from dsjax.config import Config, MeshConfig
from dsjax.config.posttraining import PostTraining
from dsjax.config.roots import ROOTS, Experiment

Meshed = TypeVar("Meshed", bound=Experiment)
Initial = TypeVar("Initial", bound=PostTraining)

PROGRAM = "dsjax"  # an installed package's; in a checkout each tool is a program of its own
SUCCESS, FAILURE, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
# What a command imports and traces stays: collecting as often as Python does by default would walk
# over it again and again, for a quarter of the time that importing and tracing take.
_COLLECT_AFTER = (50_000, 20, 100)


class _Store(argparse._StoreAction):
    """Stores values; of a list that is given twice, those of both."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, None)
        if self.nargs == "+" and before is not self.default:
            values = [*before, *values]  # pyright: ignore[reportOptionalIterable]
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """A parser that answers an argument of another project's form with the right one, and loses
    nothing of a list that is given twice.

    Attributes:
      keys: what `--set` takes, empty without a config.
    """

    keys: Mapping[str, object] = {}

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("action", None, _Store)

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        argv = sys.argv[1:] if args is None else list(args)
        flags = self._flags(argv)
        # Before argparse looks, which would take the value of an unknown flag for CONFIG.
        for flag, value in unknown_arguments.unknown(argv, flags):
            self.error(unknown_arguments.answer(flag, value, flags, self.keys))
        namespace, left = self.parse_known_args(argv, namespace)
        for word in left:
            name, equals, value = word.partition("=")
            if equals and name in self.keys:
                self.error(unknown_arguments.answer(name, value, flags, self.keys))
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return namespace

    def _flags(self, argv: Sequence[str]) -> set[str]:
        """Returns the flags of this parser and of the subcommand that `argv` names."""
        flags = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, parser in action.choices.items():
                    flags |= set(parser._option_string_actions) if name in argv else set()
        return flags


def make_parser(description: str | None) -> Parser:
    """Returns a parser with `--debug` that prints `description`, a tool's docstring with its
    examples, `as_called`.
    """
    parser = Parser(
        description=as_called(description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="on failure, print the traceback too")
    return parser


def as_called(text: str) -> str:
    """Returns a text with its `python tools/NAME.py` and `tools/NAME.py` as `dsjax NAME` where that
    is how the tool was called.
    """
    if _words()[0] != PROGRAM:
        return text
    return re.sub(r"(python )?\btools/(\w+)\.py", rf"{PROGRAM} \2", text)


def line() -> str:
    """Returns the command that runs, for the records of a run."""
    return shlex.join(_words())


def _words() -> list[str]:
    program, *rest = sys.argv
    called = program.split(" ") if program.startswith(f"{PROGRAM} ") else ["python", program]
    return [*called, *rest]


def add_commands(
    parser: argparse.ArgumentParser, explained: Mapping[str, str]
) -> dict[str, argparse.ArgumentParser]:
    """Adds the subcommands of a tool, stored as `arguments.command`.

    Args:
      explained: what each does, by name.

    Returns:
      The parser of each, by name.
    """
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    result = {}
    for name, what in explained.items():
        result[name] = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        # Accepts `--debug` after the subcommand too. A default here would overwrite the value of a
        # `--debug` given before it.
        result[name].add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return result


def add_config(
    parser: Parser,
    default: str | Path | None = None,
    *,
    optional: bool = False,
    kinds: Sequence[type[Any]] = (Config,),
) -> None:
    """Adds CONFIG and `--set`, which `load` reads. CONFIG may be left out if it has a default or is
    `optional`.

    Args:
      kinds: roots that the command reads, whose keys it suggests.
    """
    parser.keys = {key: kind for root in kinds for key, kind in settings.field_types(root).items()}
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?" if default or optional else None,
        default=default,
        help="config file, config.json of a run, or folder of a run"
        + (" (default: %(default)s)" if default else ""),
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change keys of the config, e.g. train.steps=300 optim.learning_rate=1e-3; repeatable",
    )


def load(arguments: argparse.Namespace, kind: type[settings.Root] = Config) -> settings.Root:
    """Returns the config that CONFIG and `--set` describe.

    Args:
      kind: its root; the tool of another kind of experiment names its own.

    Raises:
      settings.WrongAssignment: `--set` is wrong, or CONFIG is what should follow it.
      ValueError, FileNotFoundError: the file is not a config.
    """
    return settings.override(settings.load_config(_config(arguments), kind), arguments.set)


def _config(arguments: argparse.Namespace) -> str:
    """Returns CONFIG, which may not be an assignment."""
    config = str(arguments.config)
    if "=" in config and not Path(config).exists():
        raise settings.WrongAssignment(
            f"{config} is not a config; keys of the config follow --set: write --set {config}"
        )
    return config


def add_experiment(
    parser: Parser, *, optional: bool = False, kinds: Sequence[type[Any]] = ROOTS
) -> None:
    """Adds CONFIG, `--set` and `--init` for a command that reads many kinds of experiments;
    `load_experiment` reads the first two.
    """
    add_config(parser, optional=optional, kinds=kinds)
    parser.add_argument(
        "--init",
        metavar="CKPT",
        help="for post-training: the checkpoint that it begins with (its config.json is enough), "
        "or a config of the same model, such as configs/v3_671b.py",
    )


def load_experiment(arguments: argparse.Namespace, kinds: Sequence[type[Any]] = ROOTS) -> Any:
    """Returns the config that CONFIG and `--set` describe, whatever its root among `kinds`."""
    return settings.override(settings.load_any(_config(arguments), kinds), arguments.set)


def add_initial(parser: argparse.ArgumentParser) -> None:
    """Adds `--init`, the checkpoint that training begins with, and `--workdir`, the folder of the
    run; for post-training `load_initial` reads them.
    """
    parser.add_argument(
        "--init",
        metavar="CKPT",
        help="checkpoint to begin with: Hugging Face folder or OWNER/NAME[@REVISION] on its Hub, "
        "converted folder, or folder of a run",
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="folder of the run (default: runs/<name of the config>)",
    )


def load_initial(arguments: argparse.Namespace, kind: type[Initial]) -> tuple[Initial, Path]:
    """Returns the config that CONFIG, `--set` and `--init` describe, and the folder of its run.

    Raises:
      ValueError: neither `--init` nor the config names a checkpoint.
    """
    config = load(arguments, kind)
    if arguments.init:
        config = dataclasses.replace(config, init=arguments.init)
    if not config.init:
        raise ValueError(
            f"{config.name} begins with a checkpoint; name it: --init CKPT, a Hugging Face folder, "
            "a folder from tools/convert.py import, or the folder of a run"
        )
    return config, arguments.workdir or Path("runs") / config.name


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds `--coordinator`, `--num-processes` and `--process-id`, the arguments of
    `parallel.processes.joined`.
    """
    group = parser.add_argument_group(
        "several processes", "give all three by hand, or none under Slurm, Open MPI or GKE"
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        type=_address,
        help="address of process 0 as the others reach it",
    )
    group.add_argument("--num-processes", metavar="N", type=int, help="total number of processes")
    group.add_argument("--process-id", metavar="I", type=int, help="number of this process, from 0")


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as node1:9876")
    return text


def add_mesh(
    parser: argparse.ArgumentParser,
    axes: Sequence[str] = AXES,
    explained: str = "e.g. fsdp=8,expert=64; axes left out have 1 (default: the config's mesh)",
    name: str = "--mesh",
) -> None:
    """Adds `--mesh`, a dict from axis to size; for a config, `on_mesh` applies it."""
    parser.add_argument(
        name,
        metavar="AXIS=N,...",
        type=lambda text: mesh_sizes(text, axes),
        default={},
        help=f"devices along the axes {', '.join(axes)}, {explained}",
    )


def on_mesh(config: Meshed, sizes: Mapping[str, int]) -> Meshed:
    """Returns the config with the mesh of `--mesh`, or unchanged if that is empty."""
    if not sizes:
        return config
    all_sizes = dict.fromkeys(AXES, 1) | dict(sizes)
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **all_sizes))


def require(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    wanted: Sequence[str],
    *,
    without: Sequence[str],
) -> None:
    """Exits with wrong usage if a `wanted` argument is missing or a `without` argument is given.

    For a tool with several forms that take different arguments.
    """

    def flag(name: str) -> str:
        return "CONFIG" if name == "config" else f"--{name.replace('_', '-')}"

    absent = [
        name for name, value in vars(arguments).items() if value in ([], None) or value is False
    ]
    given = [flag(name) for name in without if name not in absent]
    missing = [flag(name) for name in wanted if name in absent]
    if given:
        parser.error(f"{', '.join(given)}: not together with {', '.join(map(flag, wanted))}")
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`, which `tables.show` takes."""
    parser.add_argument(
        "--json", action="store_const", const="-", help="print one JSON object instead"
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds CKPT (`arguments.checkpoint`, a Path), `--dtype` (None: the checkpoint's), `--override`
    and `--mesh` (axis to size, as `parallel.mesh.submesh` takes).
    """
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=Path,
        help="Hugging Face folder or name on its Hub (OWNER/NAME[@REVISION]), converted folder, "
        "folder of a run (its newest checkpoint), or a GGUF file",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "fp8", "int8", "int4"),
        help="element type of weights and computation (default: the checkpoint's); fp8, int8 and "
        "int4 are of weights alone and take less memory",
    )
    add_overrides(parser)
    explained = "e.g. data=2,tensor=4; one may be -1 for the rest (default: one device)"
    add_mesh(parser, CHECKPOINT_AXES, explained)


def add_prefill_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds `--prefill-mesh`, beside the `--mesh` of a checkpoint."""
    explained = "which run the prompts while those of --mesh decode (default: these do both)"
    add_mesh(parser, CHECKPOINT_AXES, explained, "--prefill-mesh")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds `--override`, pairs of a field of a Hugging Face config.json and the value to read in
    its place.
    """
    parser.add_argument(
        "--override",
        metavar="KEY=VALUE",
        type=_field,
        nargs="+",
        action="extend",
        default=[],
        help="read fields of a Hugging Face config.json as these JSON values, e.g. "
        "num_nextn_predict_layers=0 rope_scaling=null; the file is not changed; repeatable",
    )


def _field(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    if not key or not value:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KEY=VALUE, such as num_nextn_predict_layers=0"
        )
    try:
        return key, files.parse(value.encode(), key)
    except ValueError:
        return key, value  # a string needs no quotes: torch_dtype=float32


def mesh_sizes(text: str, axes: Sequence[str]) -> dict[str, int]:
    """Parses `data=2,tensor=4`.

    Raises:
      argparse.ArgumentTypeError: an axis is unknown or named twice, or a size is not valid.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in axes or axis in sizes:
            raise argparse.ArgumentTypeError(
                f"{part!r} of {text!r} does not set one of the axes "
                f"{', '.join(axes)} once; write e.g. data=2,tensor=4"
            )
        if size != "-1" and not (size.isdecimal() and int(size) > 0):
            raise argparse.ArgumentTypeError(
                f"{part!r}: the size of a mesh axis is a whole number above 0, or -1 for the rest"
            )
        sizes[axis] = int(size)
    try:
        MeshConfig(**dict[str, Any]({"data": 1} | sizes))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return sizes


def run(
    parser: argparse.ArgumentParser,
    execute: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the arguments, executes, and returns the exit code: 0, 1 on failure (after printing
    it), 130 on Ctrl-C.

    Wrong usage raises argparse's SystemExit (2), or returns 2 where `execute` finds it; a
    SystemExit raised by `execute` passes through.

    Args:
      argv: the arguments; None: those of the process, which then is this command and no more.
    """
    arguments = parser.parse_args(argv)
    codes: list[int] = []  # of signals
    if argv is None:
        gc.set_threshold(*_COLLECT_AFTER)
        signal.signal(signal.SIGINT, _interrupt)
        # Called after all that is registered later, such as what ends child processes.
        atexit.register(_leave, codes)
    try:
        return execute(arguments) or SUCCESS
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        codes.append(INTERRUPTED)
        return INTERRUPTED
    except SystemExit as exit_:
        codes += [code for code in (INTERRUPTED, TERMINATED) if code == exit_.code]
        raise
    except BrokenPipeError:
        # The reader of our output (head, less) has closed it. Python flushes standard output once
        # more at exit, which would fail and print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"{parser.prog}: {as_called(describe(error))}", file=sys.stderr)
        return USAGE if isinstance(error, settings.WrongAssignment) else FAILURE


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, as Python's own handler, but where it would be swallowed. There the
    signal is sent again, a little later.
    """
    if not signals.swallows(frame):
        raise KeyboardInterrupt
    threading.Timer(0.02, os.kill, (os.getpid(), number)).start()


def _leave(codes: Sequence[int]) -> None:
    """Ends the process at once after a signal. The interpreter is not taken apart, since XLA's
    threads, which go on with what was interrupted, crash when what they use is gone.
    """
    if codes:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(codes[0])


def describe(error: Exception) -> str:
    """Returns one message for a failure: what is wrong, where, and what to do."""
    reason = error.strerror if isinstance(error, OSError) else None
    place = str(error.filename) if isinstance(error, OSError) and error.filename else ""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):  # TensorStore reports a full disk as text
        where = f" writing {place}" if place else ""
        detail = "" if full else f" ({error})"
        return f"error: no space left on device{where}{detail}; free some, or choose another place"
    if reason:
        return f"error: {reason}: {place}" if place else f"error: {reason}"
    if isinstance(error, (ValueError, OSError)):
        return f"error: {error}"
    return (
        f"internal error: {type(error).__name__}: {error}; run again with --debug for the traceback"
    )

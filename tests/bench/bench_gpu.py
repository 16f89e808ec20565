"""Every figure that we want of one H100 or H200, in at most 12 minutes.

Each part runs in a process of its own with its own limit of time, the most important first, and
after each the record is written anew: a part that crashes, hangs or finds no time loses nothing but
itself. Parts print their figures one by one, so one that ends early has said what it had.

The parts are in `tests.bench.gpu_parts`. Written into a folder: `record.md`, ready for
`docs/records/`, and `figures.json`.

Run: make bench-gpu, or python -m tests.bench.bench_gpu [--out FOLDER] [--only NAME ...] [--dry-run]
`--dry-run` takes every part through the same code on a CPU, with models of no size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
NO_GPU = 3  # how the part `machine` ends where JAX finds none
BUDGET = 12 * 60.0  # seconds
_TOO_SHORT = 10.0  # seconds, in which no part gets anywhere
_KEPT = 12  # last lines of a part that failed
_NEVER_RUN = "Not a measurement: a dry run on a CPU, which shows that the script works.\n\n"


class Part(NamedTuple):
    """What runs in a process of its own; it prints a JSON object per figure."""

    title: str
    limit: float  # seconds
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


class Outcome(NamedTuple):
    title: str
    command: str
    seconds: float
    figures: list[dict[str, Any]]
    problem: str  # empty if it ran to its end
    said: str = ""  # the end of what a part printed that failed


COMMAND_BUFFERS = (
    "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
    "--xla_gpu_command_buffer_unroll_loops=true",
)


def patience(dry_run: bool) -> float:
    """Says how many times its time a part may take: a dry run may be beside other work."""
    return 5.0 if dry_run else 1.0


def parts(dry_run: bool, flags: Sequence[str]) -> dict[str, Part]:
    """Lists the parts by name, the most important first.

    Args:
      flags: those of XLA that the second run of decoding sets.
    """

    def part(title: str, limit: float, name: str, *arguments: str, flags: Sequence[str] = ()):
        small = ("--dry-run",) if dry_run else ()
        command = (sys.executable, "-m", "tests.bench.gpu_parts", name, *arguments, *small)
        xla = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
        return Part(title, limit * patience(dry_run), command, (("XLA_FLAGS", xla),))

    listed = {
        "kernels": part("Tests of the kernels that decode", 80, "decoding_kernels"),
        "decode": part("Decoding, 3B", 130, "decode"),
        "train-3B": part("Training step, 3B", 170, "train", "3B"),
        "plain": part("Decoding, 3B, without kernels of ours", 100, "decode", "plain"),
        "train-small": part("Training step, `small`", 110, "train", "small"),
        "buffers": part(
            "Decoding, 3B, with command buffers around loops", 110, "decode", flags=flags
        ),
        "fp8": part("FP8 products in training, `small`, loss beside bfloat16", 120, "fp8"),
        "products": part("Grouped and FP8 products at DeepGEMM's shapes", 80, "products"),
        "attention": part("Attention within documents", 60, "attention"),
        "documents": part("Isolated documents, `small`", 80, "documents"),
        "tests": part("Tests that need a GPU", 90, "tests"),
        "command": part("tools/train.py from start to end", 100, "command"),
    }
    if not flags:
        del listed["buffers"]
    return listed


def accepted(flags: Sequence[str]) -> list[str]:
    """Returns the flags that XLA knows here: it ends a process that sets another one."""

    def starts(flag: str) -> bool:
        environment = {**os.environ, "XLA_FLAGS": flag}
        started = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env=environment, capture_output=True, cwd=ROOT,
        )  # fmt: skip
        return started.returncode == 0

    return [flag for flag in flags if starts(flag)]


def run(part: Part, limit: float) -> Outcome:
    """Runs a part, and ends it and all that it started when its time is over."""
    start, lines = time.monotonic(), []
    with subprocess.Popen(
        part.command, cwd=ROOT, env={**os.environ, **dict(part.environment)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip

        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = process.wait()
        timer.cancel()
    seconds = time.monotonic() - start
    problem = f"it ended with {code}" if code else ""
    if seconds >= limit:
        problem = f"it was ended after {limit:.0f} s"
    figures = [found for line in lines if (found := _figure(line))]
    said = "".join(lines[-_KEPT:]) if problem else ""
    command = " ".join(["python", *part.command[1:]])
    return Outcome(part.title, command, seconds, figures, problem, said)


def _figure(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line)
    return None


def run_all(chosen: dict[str, Part], folder: Path, heading: str, budget: float) -> list[Outcome]:
    """Runs parts one after the other while there is time; writes the record after each."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    end = time.monotonic() + budget
    for part in chosen.values():
        left = end - time.monotonic()
        if left < min(_TOO_SHORT, part.limit):
            command = " ".join(["python", *part.command[1:]])
            outcomes.append(Outcome(part.title, command, 0.0, [], "no time was left for it"))
        else:
            print(f"== {part.title}", flush=True)
            outcomes.append(run(part, min(part.limit, left)))
        (folder / "record.md").write_text(record(heading, outcomes))
        saved = json.dumps([each._asdict() for each in outcomes], indent=1)
        (folder / "figures.json").write_text(saved + "\n")
    return outcomes


def record(heading: str, outcomes: Sequence[Outcome]) -> str:
    """Returns the record as Markdown."""
    return heading + "".join(map(_section, outcomes))


def _section(outcome: Outcome) -> str:
    lines = [f"\n## {outcome.title}\n", f"Command: `{outcome.command}`; {outcome.seconds:.0f} s.\n"]
    # Figures with the same names share a table.
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for figure in outcome.figures:
        tables.setdefault(tuple(figure), []).append(figure)
    for names, rows in tables.items():
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(_shown(row[name]) for name in names)} |" for row in rows]
        lines.append("")
    if outcome.problem:
        lines.append(f"Not finished: {outcome.problem}.\n")
    if outcome.said:
        lines.append(f"```\n{outcome.said.rstrip()}\n```\n")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def heading(dry_run: bool, flags: Sequence[str]) -> str:
    """Returns what comes before the figures: what ran, of which revision, where."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    revision = described.stdout.strip() or "unknown"
    asked = subprocess.run(
        [sys.executable, "-m", "tests.bench.gpu_parts", "machine", *["--dry-run"] * dry_run],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if asked.returncode == NO_GPU:
        sys.exit(
            "JAX finds no GPU here: install the extra `cuda` (pip install -e '.[cuda]'), or take "
            "the parts through a CPU with --dry-run"
        )
    machine = asked.stdout.strip().splitlines()[-1] if asked.returncode == 0 else "unknown"
    return (
        f"# One GPU, {time.strftime('%d %B %Y', time.gmtime())}\n\n"
        f"{_NEVER_RUN if dry_run else ''}"
        f"Command: `python -m tests.bench.bench_gpu{' --dry-run' if dry_run else ''}`, "
        f"revision {revision}. {machine}.\n\n"
        f"Flags of XLA in the run with command buffers: "
        f"{', '.join(f'`{flag}`' for flag in flags) or 'none that this version knows'}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the record goes; default: a new folder")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the parts to run")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, models of no size")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"
    start = time.monotonic()
    flags = accepted(COMMAND_BUFFERS)
    known = parts(arguments.dry_run, flags)
    chosen = arguments.only or list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"there is no part {unknown[0]}; the parts are {', '.join(known)}")
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    text = heading(arguments.dry_run, flags)
    left = BUDGET * patience(arguments.dry_run) - (time.monotonic() - start)
    outcomes = run_all({name: known[name] for name in chosen}, folder, text, left)
    print(f"{folder / 'record.md'}; {time.monotonic() - start:.0f} s")
    sys.exit(any(outcome.problem for outcome in outcomes))


if __name__ == "__main__":
    main()

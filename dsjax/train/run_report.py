"""report.md: a run on one page, for people: results, curves, speed, a sample, config, environment.

It is made from the run's own files alone, so it is the same however often the run was interrupted,
and can be made again at any time.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.display import duration, size
from dsjax.files import read_json, write, writing
from dsjax.train import workdir
from dsjax.train.positions import is_by_position
from dsjax.train.report import newest_line, read_lines, thinned
from dsjax.train.throughput import TIMED

SESSIONS = "sessions.jsonl"
_EVALUATIONS = 20  # rows of a table, more are thinned out
_SAMPLE = 4000  # characters
_PICTURES = {
    "loss.png": "Losses",
    "reward.png": "Rewards",
    "loss_by_position.png": "Held-out loss by position",
    "expert_load.png": "The experts' load",
}


def add_session(folder: Path, step: int) -> None:
    """Notes in sessions.jsonl that a session begins after `step` steps, when, and on what."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = folder / SESSIONS
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "started": now, **workdir.versions()}) + "\n")


def write_report(folder: Path) -> None:
    """Writes report.md from config.json, metrics.jsonl, sessions.jsonl and, as far as they exist,
    summary.json, samples.jsonl and the pictures.

    Raises:
      ValueError, OSError: a file cannot be read or written.
    """
    config, lines = read_json(folder / "config.json"), read_lines(folder / "metrics.jsonl")
    path = folder / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    sections = [
        f"# {config['name']}\n\n{_state(config, lines, summary)}",
        _section("Results", _table(("", ""), _numbers(lines, summary))),
        _section("Curves", _pictures(folder)),
        _section("Evaluations", _evaluations(lines)),
        _section("Speed", _table(("", ""), _speed(lines, summary))),
        _section("Sample", _sample(folder, config, summary)),
        _section("Environment", _sessions(read_lines(folder / SESSIONS))),
        _section("Config", _fenced(json.dumps(config, indent=2), "json")),
    ]
    write(folder / "report.md", "\n\n".join(filter(None, sections)) + "\n")


def _state(
    config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> str:
    done, steps = lines[-1]["step"] if lines else 0, config["train"]["steps"]
    if summary:
        return f"Finished after {summary['steps']:,} steps."
    return f"Not finished: {done:,} of {steps:,} steps are done."


def _numbers(
    lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> list[tuple[str, object]]:
    """Returns the scalars of the summary or, before there is one, of the newest lines."""
    found: dict[str, object] = {}
    for line in (_newest(lines, "loss"), _newest(lines, "eval_"), summary):
        found |= {
            name: value
            for name, value in line.items()
            if not is_by_position(name) and name not in (*TIMED, "name", "peak", "sample")
        }
    timed = ("compile_seconds", "median_step_seconds")
    return [(name, value) for name, value in found.items() if name not in timed]


def _newest(lines: Sequence[Mapping[str, Any]], prefix: str) -> Mapping[str, Any]:
    """Returns the newest line with a metric whose name begins with `prefix`; empty if none has."""
    having = (line for line in reversed(lines) if any(name.startswith(prefix) for name in line))
    return next(having, {})


def _pictures(folder: Path) -> str:
    found = [(name, text) for name, text in _PICTURES.items() if (folder / name).is_file()]
    return "\n\n".join(f"![{text}]({name})" for name, text in found)


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> str:
    made = [line for line in lines if any(name.startswith("eval_") for name in line)]
    if not made:
        return ""
    names = [name for name in made[-1] if not is_by_position(name)]
    kept = thinned(made, _EVALUATIONS)
    return _table(names, ([line.get(name) for name in names] for line in kept))


def _speed(
    lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> list[tuple[str, object]]:
    newest = {**_newest(lines, "step_seconds"), **summary}
    median = summary.get("median_step_seconds", newest.get("step_seconds"))
    rows = {
        "tokens per second": newest.get("tokens_per_second"),
        "seconds per step": median,
        "of them waiting for data": newest.get("data_seconds"),
        "MFU": newest.get("mfu"),
        "peak for the MFU": newest.get("peak"),
        "memory at most": _known(size, newest.get("memory_bytes")),
        "wall time": _known(duration, newest.get("wall_seconds")),
        "of it compiling": _known(duration, newest.get("compile_seconds")),
    }
    return [(name, value) for name, value in rows.items() if value is not None]


def _known(form: Any, value: float | None) -> str | None:
    return None if value is None else form(value)


def _sample(folder: Path, config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Returns the summary's sample or, of rewards, the newest answer with its reward."""
    if sample := summary.get("sample"):
        return _fenced(f"{sample['prompt']}[...]{sample['completion']}")
    # Where nothing is rewarded, a file of this name is what the run learns from (tools/r1.py).
    newest = newest_line(folder / "samples.jsonl") if "rl" in config else None
    if newest is None:
        return ""
    said = f"Step {newest['step']}, reward {_cell(newest['reward'])}:"
    return f"{said}\n\n{_fenced(newest['prompt'] + '[...]' + newest['text'])}"


def _sessions(sessions: Sequence[Mapping[str, Any]]) -> str:
    """Returns a row for each session, and the versions of the newest; in a row, what changed."""
    rows, before = [], sessions[0] if sessions else {}
    for session in sessions:
        ignored = ("step", "started")
        changed = [
            f"{name} {before.get(name)} -> {value}"
            for name, value in session.items()
            if name not in ignored and before.get(name) != value
        ]
        rows.append((session["started"], session["step"], ", ".join(changed)))
        before = session
    table = _table(("session began", "after step", "changed"), rows)
    versions = [(name, value) for name, value in before.items() if name not in ("step", "started")]
    return f"{table}\n\n{_table(('', 'newest session'), versions)}" if sessions else ""


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    if not lines:
        return ""
    head = "| " + " | ".join(columns) + " |"
    return "\n".join([head, "|" + " --- |" * len(columns), *lines])


def _cell(value: object) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _fenced(text: str, language: str = "") -> str:
    """Returns text as a block that nothing inside it ends."""
    text = text if len(text) <= _SAMPLE or language else f"{text[:_SAMPLE]}\n[cut]"
    fence = "`" * 3
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"

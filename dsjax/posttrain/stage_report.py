"""The report of a pipeline: r1.json and r1.png, written again after every stage.

r1.json is a list with an object per stage: `name`; `accuracy`, the share of right answers to
held-out problems, with `accuracy_low` and `accuracy_high`, its 95 % interval; `pass_at_k`; the
share of well-formed answers, `format`; tokens per answer, `length`; `entropy`, the mean of -log p
of drawn tokens in nats; wall time in `seconds`; and some answers, `samples`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dsjax.files import write
from dsjax.train.plots import new_figure
from dsjax.train.report import read_lines

Report = Mapping[str, Any]
_SHOWN = 400  # characters of an answer on the console


def write_report(folder: Path, stages: Sequence[Report], title: str) -> None:
    """Writes both files.

    Args:
      folder: of the pipeline; each stage's own folder in it holds its metrics.jsonl.
    """
    write(folder / "r1.json", json.dumps(list(stages), indent=2) + "\n")
    curves = {
        stage["name"]: [
            line
            for line in read_lines(folder / stage["name"] / "metrics.jsonl")
            if "reward" in line
        ]
        for stage in stages
    }
    draw(folder / "r1.png", stages, {name: lines for name, lines in curves.items() if lines}, title)


def draw(
    path: Path,
    stages: Sequence[Report],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str,
) -> None:
    """Draws held-out accuracy after each stage, and what happened inside those that learn from
    rewards.

    Args:
      curves: the lines of metrics.jsonl that have a `reward`, by stage.
    """
    figure = new_figure(max(8.0, 1.5 * len(stages)), 8)
    after, over_time = figure.subplots(2, 1)
    places = range(len(stages))
    values = [stage["accuracy"] for stage in stages]
    spread = [
        [stage["accuracy"] - stage["accuracy_low"] for stage in stages],
        [stage["accuracy_high"] - stage["accuracy"] for stage in stages],
    ]
    most = [max(stage["pass_at_k"].values()) for stage in stages]
    k = max((int(k) for stage in stages for k in stage["pass_at_k"]), default=1)
    after.bar(places, most, width=0.8, color="0.88", label=f"pass@{k}")
    after.bar(places, values, width=0.5, yerr=spread, capsize=3, label="accuracy, 95 % interval")
    for place, value in zip(places, values, strict=True):
        after.annotate(f"{value:.1%}", (place, value), (8, 3), textcoords="offset points")
    after.set_xticks(places, [stage["name"] for stage in stages], rotation=15)
    after.set(ylabel="held-out problems", title=title, ylim=(0, 1.15))  # room for the legend
    after.set_yticks(np.linspace(0, 1, 6))
    after.legend(loc="upper left", ncols=2)
    _draw_curves(over_time, curves)
    figure.savefig(path, dpi=120)


def _draw_curves(axes: Any, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    lengths = axes.twinx()
    start = 0
    for number, (name, lines) in enumerate(curves.items()):
        steps = [start + line["step"] for line in lines]
        axes.plot(steps, [line["right"] for line in lines], color=f"C{number}", label=name)
        lengths.plot(steps, [line["length"] for line in lines], ":", color=f"C{number}")
        start = steps[-1]
    axes.set(xlabel="steps of reinforcement learning", ylabel="right answers in training")
    lengths.set_ylabel("tokens per answer (dotted)")
    lengths.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(loc="upper left")


def _half_width(stage: Report) -> float:
    """Returns half of the interval's width; it is nearly symmetric."""
    return (stage["accuracy_high"] - stage["accuracy_low"]) / 2


def print_stages(stages: Sequence[Report], console: Console) -> None:
    """Shows a table of all stages, and one answer of the newest."""
    table = Table("stage", "accuracy, 95 %", "format", "length", "entropy", "seconds")
    ks = sorted({int(k) for stage in stages for k in stage["pass_at_k"]} - {1})
    for k in ks:
        table.add_column(f"pass@{k}", justify="right")
    for stage in stages:
        table.add_row(
            stage["name"],
            f"{stage['accuracy']:.1%} +- {_half_width(stage):.1%}",
            f"{stage['format']:.1%}",
            f"{stage['length']:.1f}",
            f"{stage['entropy']:.3f}",
            f"{stage['seconds']:,.0f}",
            *(f"{stage['pass_at_k'][str(k)]:.1%}" for k in ks),
        )
    console.print(table)
    for sample in stages[-1]["samples"][:1]:
        text = f"{sample['prompt']}{sample['text']}"
        console.print(f"an answer of {stages[-1]['name']}:", style="dim")
        console.print(text[:_SHOWN], markup=False, highlight=False)

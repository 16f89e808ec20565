"""Computes what a pipeline schedule costs, beside what the papers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dsjax import tables
from dsjax.files import check_writable, writing
from dsjax.parallel import lockstep, schedules
from dsjax.parallel.schedules import expected
from dsjax.parallel.timetable import Costs, Schedule, simulate
from dsjax.plan import drawing


def plan(name: str, stages: int, microbatches: int, out: Path | None = None) -> dict[str, Any]:
    """Returns the figures of a schedule, and draws it into the file `out`.

    Raises:
      ValueError: there is no such schedule, or it cannot be built for these numbers; or the file
        cannot be written.
    """
    schedule = schedules.build(name, stages, microbatches)
    if out:
        check_writable(out)
        with writing(out):
            drawing.draw(schedule, out)
    return summarize(schedule)


def summarize(schedule: Schedule, costs: Costs | None = None) -> dict[str, Any]:
    """Returns the figures of a schedule, ready for JSON; times in the unit of the costs."""
    costs = Costs() if costs is None else costs
    timing = simulate(schedule, costs)
    formula = expected(schedule, costs)
    stages, microbatches = schedule.n_stages, schedule.n_microbatches
    return {
        "schedule": schedule.name,
        "stages": stages,
        "microbatches": microbatches,
        "ranks": schedule.n_ranks,
        "costs": costs._asdict(),
        "makespan": timing.makespan,
        "bubble": max(timing.bubble),
        "bubble_share": timing.bubble_share,
        "peak_activations": max(timing.live),
        "parameters_per_device": max(map(len, schedule.held())),
        "formula": {
            "bubble_text": formula.formula,
            "bubble": formula.bubble,
            "peak_activations": formula.live,
            "parameters_per_device": formula.parameters,
        },
        "lock_step_makespan": lockstep.makespan(schedule, costs),
        "per_rank": [
            {
                "rank": rank,
                "stages": list(held),
                "busy": timing.busy[rank],
                "bubble": timing.bubble[rank],
                "peak_activations": timing.live[rank],
                "peak_kept": timing.kept[rank],
            }
            for rank, held in enumerate(schedule.held())
        ],
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the ranks, and the measured figures beside the published ones."""
    title = "{schedule}: {stages} stages on {ranks} ranks, {microbatches} micro-batches"
    columns = (">rank", ">stages", ">busy", ">bubble", ">peak activations", ">with deferred W")
    rows = []
    for row in summary["per_rank"]:
        stages = ", ".join(map(str, row["stages"]))
        figures = (row["busy"], row["bubble"], row["peak_activations"], row["peak_kept"])
        rows.append((row["rank"], stages, *map(_number, figures)))
    console.print(tables.table(title.format(**summary), columns, rows))
    formula = summary["formula"]
    rows = [
        (label, _number(summary[key]), _number(formula[key]))
        for label, key in (
            (f"bubble of a rank, {formula['bubble_text']}", "bubble"),
            ("peak activations, chunks of micro-batches", "peak_activations"),
            ("parameters per device, stages", "parameters_per_device"),
        )
    ]
    rows += [
        ("bubble, share of all time", f"{summary['bubble_share']:.1%}"),
        ("makespan", _number(summary["makespan"])),
        ("makespan with all ranks in step", _number(summary["lock_step_makespan"])),
    ]
    console.print(tables.table("", ("", ">measured", ">published"), rows))
    times = (
        "times: F = {forward:g}, B = {backward:g}, of which W = {weights:g}; F&B = {overlapped:g}"
    )
    console.print(Text(times.format(**summary["costs"])))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"

"""The summary of a schedule says what the simulation says, and prints it."""

import io
import json

import pytest
from rich.console import Console

from dsjax.parallel import schedules
from dsjax.parallel.timetable import Costs
from dsjax.plan import pipeline


def printed(summary):
    console = Console(width=100, file=io.StringIO(), record=True)
    pipeline.print_summary(summary, console)
    return console.export_text()


def test_summary_of_dualpipe_has_the_published_figures():
    summary = pipeline.summarize(schedules.build("dualpipe", 8, 20))
    assert json.loads(json.dumps(summary)) == summary
    assert summary["bubble"] == summary["formula"]["bubble"] == 6
    assert summary["peak_activations"] == summary["formula"]["peak_activations"] == 9
    assert summary["parameters_per_device"] == summary["formula"]["parameters_per_device"] == 2
    assert summary["makespan"] == 66 and summary["bubble_share"] == pytest.approx(6 / 66)
    assert summary["lock_step_makespan"] == 78
    assert summary["per_rank"][1] == {
        "rank": 1,
        "stages": [1, 6],
        "busy": 60,
        "bubble": 6,
        "peak_activations": 9,
        "peak_kept": 9,
    }


def test_costs_reach_all_figures():
    costs = Costs(forward=2, backward=6, weights=2, overlapped=7)
    summary = pipeline.summarize(schedules.build("1f1b", 4, 8), costs)
    assert summary["makespan"] == 8 * 8 + 24 and summary["bubble"] == 24
    assert summary["formula"]["bubble"] == 24 and summary["costs"]["overlapped"] == 7


def test_printed_summary_has_ranks_and_formulas():
    text = printed(pipeline.summarize(schedules.build("zb1p", 4, 8)))
    for expected in (
        "zb1p: 4 stages on 4 ranks, 8 micro-batches",
        "bubble of a rank, (P-1)(F+B-2W)",
        "11.1%",
        "F = 1, B = 2, of which W = 1; F&B = 3",
    ):
        assert expected in text, expected
    rows = [line.split() for line in text.splitlines()]
    assert ["3", "3", "24", "3", "1", "4"] in rows  # rank, stage, busy, bubble, live, kept
    assert ["makespan", "27"] in rows


def test_formula_that_does_not_hold_is_not_printed():
    text = printed(pipeline.summarize(schedules.build("zb1p", 4, 2)))
    (line,) = (line for line in text.splitlines() if "bubble of a rank" in line)
    assert line.split()[-2:] == ["5", "-"]


def test_picture_that_cannot_be_written_is_answered_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*; make it"):
        pipeline.plan("1f1b", 2, 4, tmp_path / "absent" / "f.png")
    with pytest.raises(ValueError, match="is a folder; name a file to write"):
        pipeline.plan("1f1b", 2, 4, tmp_path)

"""What is counted, what is written down, and when a run stops."""

import json
import math

import numpy as np
import pytest

from dsjax.train.faults import FEWEST, MAX_SKIPPED, Faults

ROWS = range(8, 16)


def test_steps_without_an_update_are_counted_and_written_down(tmp_path):
    faults = Faults(tmp_path, step=0, skipped=2)
    assert faults.check(1, 3.0, 1.0, ROWS, skipped=False) is None
    said = faults.check(2, math.nan, math.inf, ROWS, skipped=True)
    assert said and "step 2: loss is nan and grad_norm inf; skipped" in said
    assert "rows 8 to 15" in said and (faults.skipped, faults.in_a_row) == (3, 1)
    assert json.loads(faults.path.read_text()) == {
        "step": 2,
        "kind": "skipped",
        "loss": "nan",
        "grad_norm": "inf",
        "rows": [8, 16],
    }
    faults.check(3, 3.0, 1.0, ROWS, skipped=False)
    assert (faults.skipped, faults.in_a_row) == (3, 0)


def test_run_stops_after_some_in_a_row_but_not_when_one_between_is_fine(tmp_path):
    faults = Faults(tmp_path, step=0, skipped=0)
    for step in range(1, 3 * MAX_SKIPPED):
        faults.check(step, math.nan, 1.0, ROWS, skipped=step % MAX_SKIPPED != 0)
    with pytest.raises(ValueError, match=r"step 15: loss is nan .* the 4 steps before it.*faults"):
        for step in range(15, 30):
            faults.check(step, math.nan, 1.0, ROWS, skipped=True)


def test_spike_is_said_and_written_down_and_noise_is_not(tmp_path):
    faults = Faults(tmp_path, step=0, skipped=0)
    losses = 3.0 + 0.05 * np.random.default_rng(0).normal(size=300)
    losses[: FEWEST // 2] = 9.0  # the start of a run is no spike
    said = [
        faults.check(n, loss, 1.0, ROWS, skipped=False) for n, loss in enumerate(losses.tolist())
    ]
    assert not any(said) and not faults.path.exists()
    said = faults.check(300, 4.0, 1.0, ROWS, skipped=False)
    assert said and "step 300: loss 4.0000 is a spike: recent steps have 2.99" in said
    assert json.loads(faults.path.read_text())["kind"] == "spike"


def test_loss_that_hardly_varies_may_rise_a_little(tmp_path):
    faults = Faults(tmp_path, step=0, skipped=0)
    for step in range(FEWEST):
        faults.check(step, 2.0, 1.0, ROWS, skipped=False)
    assert faults.check(99, 2.03, 1.0, ROWS, skipped=False) is None
    assert faults.check(99, 2.1, 1.0, ROWS, skipped=False)


def test_lines_of_steps_that_are_taken_again_are_dropped(tmp_path):
    """A run was killed after step 5 and goes on after step 3, where its checkpoint is."""
    faults = Faults(tmp_path, step=0, skipped=0)
    for step in (2, 3, 5):
        faults.check(step, math.nan, 1.0, ROWS, skipped=True)
    with faults.path.open("a") as file:
        file.write('{"step": 6, "ki')  # cut short when it was killed
    Faults(tmp_path, step=3, skipped=2, silent=True)  # another process
    assert len(faults.path.read_text().splitlines()) == 4
    again = Faults(tmp_path, step=3, skipped=2)
    again.check(5, math.nan, 1.0, ROWS, skipped=True)
    lines = [json.loads(line) for line in faults.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 5] and again.skipped == 3
    assert lines[0]["loss"] == "nan" and lines[0]["grad_norm"] == 1.0

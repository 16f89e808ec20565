"""The pictures are drawn, also from little."""

import numpy as np
import pytest

from dsjax.train import plots

LINES = [
    {"step": 1, "tokens": 10, "loss": 3.0, "mtp_loss": 3.1, "max_violation": 0.9},
    {"step": 2, "tokens": 20, "loss": 2.5, "mtp_loss": 2.8, "max_violation": 0.4},
    {"step": 2, "tokens": 20, "eval_loss": 2.6, "bits_per_byte": 2.0},
]


@pytest.mark.parametrize("lines", [LINES, LINES[:1], []])
def test_plots_are_png(tmp_path, lines):
    plots.draw_loss(tmp_path / "loss.png", lines, "tiny")
    plots.draw_expert_load(tmp_path / "load.png", lines, np.full((3, 4), 0.25), "tiny")
    for name in ("loss.png", "load.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def curves(monkeypatch):
    """A function that returns the curves of the figure that was drawn last, by their names."""
    figures = []
    make = plots.new_figure
    monkeypatch.setattr(
        plots, "new_figure", lambda *size: figures.append(make(*size)) or figures[-1]
    )
    return lambda: {
        line.get_label(): line.get_xydata().tolist() for line in figures[-1].axes[0].get_lines()
    }


def test_loss_plot_shows_every_curve(curves, tmp_path):
    plots.draw_loss(tmp_path / "loss.png", LINES, "tiny")
    assert curves() == {
        "training": [[10, 3.0], [20, 2.5]],
        "MTP": [[10, 3.1], [20, 2.8]],
        "held-out": [[20, 2.6]],
    }


def test_loss_plot_has_no_mtp_where_none_trains(curves, tmp_path):
    lines = [line | {"mtp_loss": 0.0} for line in LINES]
    plots.draw_loss(tmp_path / "loss.png", lines, "tiny")
    assert curves().keys() == {"training", "held-out"}


def test_rewards_of_nothing_are_drawn(curves, tmp_path):
    """Where no answer is right the reward is 0; where none could be judged there is none."""
    lines = [{"step": step, "reward": worth} for step, worth in enumerate([0.0, 0.5, None, 0.0])]
    plots.draw_reward(tmp_path / "reward.png", lines, "tiny")
    assert curves() == {"training": [[0, 0.0], [1, 0.5], [3, 0.0]]}


def test_losses_that_were_not_finite_are_left_out(curves, tmp_path):
    lines = [
        {"step": 1, "tokens": 10, "loss": 3.0},
        {"step": 1, "tokens": 10, "eval_loss": 3.5, "eval_loss_0_31": 4.0, "eval_loss_32_63": None},
        {"step": 2, "tokens": 20, "eval_loss": None, "eval_loss_0_31": None},
    ]
    plots.draw_loss(tmp_path / "loss.png", lines, "tiny")
    assert curves() == {"training": [[10, 3.0]], "held-out": [[10, 3.5]]}
    plots.draw_loss_by_position(tmp_path, lines, "tiny")
    assert curves() == {"after step 1": [[32, 4.0]]}


def test_loss_by_position_has_a_curve_for_each_evaluation(tmp_path):
    assert plots.draw_loss_by_position(tmp_path, LINES, "tiny") is None
    lines = [
        {"step": step, "tokens": 1, "eval_loss_0_31": 3.0, "eval_loss_32_63": 2.0 - step / 10}
        for step in (1, 2)
    ]
    path = plots.draw_loss_by_position(tmp_path, [*LINES, *lines], "tiny")
    assert path is not None and path.name == "loss_by_position.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_of_many_evaluations_some_are_drawn_and_the_newest(curves, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "_CURVES", 3)
    lines = [{"step": step, "eval_loss_0_31": 9.0 - step} for step in range(1, 9)]
    plots.draw_loss_by_position(tmp_path, lines, "tiny")
    assert [points for points in curves().values()] == [[[32, 6.0]], [[32, 3.0]], [[32, 1.0]]]


def test_curves_are_those_that_the_lines_have(tmp_path):
    plots.draw_curves(tmp_path, LINES, "tiny")
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png"}
    plots.draw_curves(tmp_path, [{"step": 1, "tokens": 4, "loss": 0.1, "reward": 0.5}], "tiny")
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", "reward.png"}

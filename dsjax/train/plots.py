"""The pictures of a run, drawn from its metrics: its losses and its experts' load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.train.positions import is_by_position, position_of
from dsjax.train.report import thinned

_CURVES = 40  # of one picture: more are not told apart, and each is drawn anew at every evaluation


def new_figure(width: float, height: float) -> Any:
    """Makes an empty figure; sizes are in inches."""
    # pyplot would keep global state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curves(folder: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws all curves that the lines of metrics.jsonl have, in loss.png, loss_by_position.png and,
    of rewards, reward.png.
    """
    draw_loss(folder / "loss.png", lines, title)
    draw_loss_by_position(folder, lines, title)
    if any("reward" in line for line in lines):
        draw_reward(folder / "reward.png", lines, title)


def draw_loss(path: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws training, MTP and held-out loss over tokens.

    Args:
      lines: the objects of metrics.jsonl.
    """
    curves = {"loss": ("training", "-"), "mtp_loss": ("MTP", "--"), "eval_loss": ("held-out", "o-")}
    if not any(line.get("mtp_loss") for line in lines):  # it is 0 where no MTP module trains
        del curves["mtp_loss"]
    _draw(path, lines, curves, ("tokens", "loss, nats per token"), title)


def draw_reward(path: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws the mean reward in training and on held-out questions over the steps."""
    curves = {"reward": ("training", "-"), "eval_reward": ("held-out", "o-")}
    _draw(path, lines, curves, ("step", "mean reward"), title)


def _draw(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    curves: Mapping[str, tuple[str, str]],
    labels: tuple[str, str],
    title: str,
) -> None:
    """Draws curves, {metric: (name, style)}, over the metric that is the first label."""
    figure, over = new_figure(8, 4.5), labels[0]
    axes = figure.add_subplot()
    for key, (name, style) in curves.items():
        points = [(line[over], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend()
    figure.savefig(path, dpi=120)


def draw_loss_by_position(
    folder: Path, lines: Sequence[Mapping[str, Any]], title: str
) -> Path | None:
    """Draws the held-out loss over the position, one curve for each evaluation or, where they are
    many, for some of them, in loss_by_position.png.

    Returns:
      the picture; None, and none is drawn, where no line has losses by position.
    """
    curves = [
        (
            line["step"],
            [
                (position_of(name), loss)
                for name, loss in line.items()
                if is_by_position(name) and loss is not None  # null: it was not finite
            ],
        )
        for line in lines
    ]
    curves = thinned([(step, points) for step, points in curves if points], _CURVES)
    if not curves:
        return None
    figure, last = new_figure(8, 4.5), max(curves[-1][0], 1)
    axes = figure.add_subplot()
    for step, points in curves:
        ends, losses = zip(*points, strict=True)
        axes.plot([end + 1 for end in ends], losses, "o-", color=str(0.85 - 0.85 * step / last))
    axes.lines[-1].set(color="C0", label=f"after step {last}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (upper end of its group)", ylabel="held-out loss, nats per token")
    axes.set_title(f"{title}: darker is later")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss_by_position.png"
    figure.savefig(path, dpi=120)
    return path


def draw_expert_load(
    path: Path, lines: Sequence[Mapping[str, Any]], load_LE: np.ndarray, title: str
) -> None:
    """Draws the maximum violation over the run, and each expert's load at its end.

    Args:
      lines: the objects of metrics.jsonl.
      load_LE: each expert's share of its layer's assignments; rows sum to 1.
    """
    figure = new_figure(11, 4)
    over_time, final = figure.subplots(1, 2)
    points = [(line["step"], line["max_violation"]) for line in lines if "max_violation" in line]
    if points:
        over_time.plot(*zip(*points, strict=True))
    over_time.set(xlabel="step", ylabel="max violation (busiest expert / mean - 1)", title=title)
    over_time.set_ylim(bottom=0)
    over_time.grid(alpha=0.3)
    relative = load_LE * load_LE.shape[1]
    image = final.imshow(
        relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest"
    )
    final.set(xlabel="expert", ylabel="MoE layer (MTP last)", title="load / mean load, last step")
    final.set_yticks(range(len(relative)))
    figure.colorbar(image, ax=final)
    figure.savefig(path, dpi=120)

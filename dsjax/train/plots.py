"""The pictures of a run, drawn from its metrics: loss.png and expert_load.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def new_figure(width: float, height: float) -> Any:
    """Makes an empty figure; sizes are in inches."""
    # pyplot would keep global state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_loss(path: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws training, MTP and held-out loss over tokens.

    Args:
      lines: the objects of metrics.jsonl.
    """
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    for key, label, style in (
        ("loss", "training", "-"),
        ("mtp_loss", "MTP", "--"),
        ("eval_loss", "held-out", "o-"),
    ):
        points = [(line["tokens"], line[key]) for line in lines if line.get(key)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend()
    figure.savefig(path, dpi=120)


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

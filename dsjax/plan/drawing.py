"""Draws a pipeline schedule: ranks as rows, time to the right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsjax.parallel.timetable import Costs, Op, Schedule, Timing, simulate

# Okabe and Ito's colours can be told apart by the colour-blind and in greyscale.
COLOURS = {"F": "#0072B2", "B": "#D55E00", "I": "#F0E442", "W": "#009E73"}
MEANINGS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_PALEST = 0.5  # white mixed into the colour of a rank's last chunk

_ROW, _MARGIN = 0.55, 1.6  # inches
_LEAST_WIDTH, _MOST_SIZE = 8.0, 60.0  # inches
_UNIT = 0.26  # inches of the shortest operation: room for a two-digit number
_LEAST_LABEL = 9.0  # points; smaller boxes get no number


def draw(schedule: Schedule, path: Path, costs: Costs | None = None) -> None:
    """Draws what each rank does when, and saves the picture.

    Numbers are micro-batches. A rank's first chunk has the full colour, its last the palest: chunks
    are the two directions of DualPipe, or the way down and back of DualPipeV. An overlapped pair is
    one box, the forward above the backward. White is bubble.

    Args:
      path: its suffix gives the format, PNG without one.

    Raises:
      ValueError: matplotlib cannot write the format.
      OSError: the file cannot be written.
    """
    figure = paint(schedule, Costs() if costs is None else costs)
    picture, known = path.suffix[1:].lower() or "png", figure.canvas.get_supported_filetypes()
    if picture not in known:
        raise ValueError(f"{path}: cannot draw a .{picture}; use one of {', '.join(known)}")
    figure.savefig(path, dpi=120, format=picture)


def paint(schedule: Schedule, costs: Costs) -> Any:
    """Returns the matplotlib figure that `draw` saves."""
    # Not pyplot, which keeps global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    timing = simulate(schedule, costs)
    shortest = min(costs.of((op,)) for order in schedule.orders for slot in order for op in slot)
    width = min(max(timing.makespan / shortest * _UNIT, _LEAST_WIDTH), _MOST_SIZE)
    height = min(_ROW * schedule.n_ranks, _MOST_SIZE)
    points = 72 * width / timing.makespan, 72 * height / schedule.n_ranks  # of a box of size 1
    figure = Figure(figsize=(width + 1, height + _MARGIN), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    held = schedule.held()
    for rank, order in enumerate(schedule.orders):
        for slot, start, end in zip(order, timing.starts[rank], timing.ends[rank], strict=True):
            for op, bottom, top in _boxes(slot, rank):
                colour = _shade(COLOURS[op.kind], held[rank].index(op.stage), len(held[rank]))
                size = (end - start, top - bottom)
                axes.add_patch(
                    Rectangle((start, bottom), *size, facecolor=colour, edgecolor="white", lw=0.6)
                )
                if min(size[0] * points[0], size[1] * points[1]) >= _LEAST_LABEL:
                    axes.text(
                        start + size[0] / 2,
                        bottom + size[1] / 2,
                        str(op.microbatch),
                        color=_ink(colour),
                        fontsize=8,
                        ha="center",
                        va="center_baseline",
                    )
            if len(slot) == 2:
                outline = Rectangle(
                    (start, rank - 0.45), end - start, 0.9, fill=False, edgecolor="black", lw=1.2
                )
                axes.add_patch(outline)
    axes.set(
        xlim=(0, timing.makespan),
        ylim=(schedule.n_ranks - 0.5, -0.5),
        yticks=range(schedule.n_ranks),
        xlabel="time",
        ylabel="rank",
    )
    axes.set_title(_title(schedule, timing), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    patches = [Patch(facecolor=colour, label=label) for label, colour in _legend(schedule)]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _boxes(slot: tuple[Op, ...], rank: int) -> Iterator[tuple[Op, float, float]]:
    """Yields each operation with the bottom and top of its box; rows count downwards."""
    step = 0.9 / len(slot)
    for place, op in enumerate(slot):
        yield op, rank - 0.45 + place * step, rank - 0.45 + (place + 1) * step


def _title(schedule: Schedule, timing: Timing) -> str:
    return (
        f"{schedule.name}: {schedule.n_stages} stages on {schedule.n_ranks} ranks, "
        f"{schedule.n_microbatches} micro-batches\n"
        f"bubble {timing.bubble_share:.1%} (at most {max(timing.bubble):g} of "
        f"{timing.makespan:g}), peak activations {max(timing.live)}, "
        f"stages per rank {max(map(len, schedule.held()))}"
    )


def _legend(schedule: Schedule) -> Iterator[tuple[str, str]]:
    """Yields a label and a colour for each kind of operation and each chunk."""
    kinds = {op.kind for order in schedule.orders for slot in order for op in slot}
    chunks = max(map(len, schedule.held()))
    entries = [route[0] for route in dict.fromkeys(schedule.routes)]
    for kind, colour in COLOURS.items():
        for chunk in range(chunks if kind in kinds else 0):
            which = ""
            if len(entries) > 1:
                which = f", entered at rank {entries[chunk]}"
            elif chunks > 1:
                which = f", chunk {chunk}"
            yield f"{kind} {MEANINGS[kind]}{which}", _shade(colour, chunk, chunks)


def _shade(colour: str, chunk: int, chunks: int) -> str:
    """Mixes white into a colour "#RRGGBB", more for later chunks."""
    white = _PALEST * chunk / max(chunks - 1, 1)
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * white):02X}" for part in parts)


def _ink(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"

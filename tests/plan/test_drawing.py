"""The picture shows every operation where it runs, in colours that everybody can tell apart."""

import itertools

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex

from dsjax.parallel import schedules
from dsjax.parallel.timetable import Costs
from dsjax.plan import drawing

# Machado, Oliveira and Fernandes, IEEE TVCG 15 (2009): linear RGB as seen without green, without
# red receptors
BLINDNESS = {
    "none": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}


def linear(colour):
    parts = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear RGB, in which a distance of 2 is about the least that one sees."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_can_be_told_apart(blindness):
    shades = [drawing._shade(colour, at, 2) for colour in drawing.COLOURS.values() for at in (0, 1)]
    seen = [lab(BLINDNESS[blindness] @ linear(colour)) for colour in [*shades, "#FFFFFF"]]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


def shape(patch):
    return tuple(round(x, 9) for x in (*patch.get_xy(), patch.get_width(), patch.get_height()))


def boxes(axes):
    """(left, top, width, height, colour) of what is filled."""
    return {
        (*shape(patch), to_hex(patch.get_facecolor())) for patch in axes.patches if patch.get_fill()
    }


def test_boxes_are_where_operations_run():
    (axes,) = drawing.paint(schedules.build("gpipe", 2, 1), Costs()).axes
    forward, backward = (drawing.COLOURS[kind].lower() for kind in "FB")
    assert boxes(axes) == {
        (0, -0.45, 1, 0.9, forward),
        (4, -0.45, 2, 0.9, backward),
        (1, 0.55, 1, 0.9, forward),
        (2, 0.55, 2, 0.9, backward),
    }
    assert [text.get_text() for text in axes.texts] == ["0"] * 4
    assert axes.get_ylim() == (1.5, -0.5)  # rank 0 is at the top


def test_overlapped_pair_shares_an_outlined_box():
    schedule = schedules.build("dualpipe", 2, 4)
    (axes,) = drawing.paint(schedule, Costs()).axes
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    pairs = [slot for order in schedule.orders for slot in order if len(slot) == 2]
    assert len(outlines) == len(pairs) > 0
    halves = {box for box in boxes(axes) if box[0] == outlines[0].get_x() and box[1] < 0.5}
    assert {(top, height) for _, top, _, height, _ in halves} == {(-0.45, 0.45), (0, 0.45)}
    assert {width for _, _, width, _, _ in halves} == {3}
    # the forward is of one direction, the backward of the other: full and pale
    shades = {
        kind: [drawing._shade(drawing.COLOURS[kind], at, 2).lower() for at in (0, 1)]
        for kind in "FB"
    }
    drawn = {top: colour for _, top, _, _, colour in halves}
    assert (shades["F"].index(drawn[-0.45]), shades["B"].index(drawn[0])) in [(0, 1), (1, 0)]


def test_title_and_legend_say_what_is_drawn():
    figure = drawing.paint(schedules.build("dualpipe", 8, 20), Costs())
    title = figure.axes[0].get_title()
    assert "8 stages on 8 ranks, 20 micro-batches" in title
    assert "bubble 9.1% (at most 6 of 66), peak activations 9, stages per rank 2" in title
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["F forward, entered at rank 0", "F forward, entered at rank 7"]
    assert len(labels) == 8
    figure = drawing.paint(schedules.build("interleaved", 4, 2), Costs())
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [f"{what}, chunk {c}" for what in ("F forward", "B backward") for c in (0, 1)]
    figure = drawing.paint(schedules.build("1f1b", 2, 2), Costs())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "F forward",
        "B backward",
    ]


def test_picture_is_a_readable_png(tmp_path):
    drawing.draw(schedules.build("dualpipe", 8, 20), tmp_path / "F.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "F.png").shape
    assert width > 66 * 0.26 * 120 and height > 8 * 0.55 * 120


def test_large_schedule_is_drawn_without_numbers(tmp_path):
    figure = drawing.paint(schedules.build("1f1b", 2, 330), Costs())
    assert figure.get_size_inches()[0] <= 61 and not list(figure.axes[0].texts)


def test_picture_without_ending_is_png_and_an_unknown_one_is_refused(tmp_path):
    schedule = schedules.build("1f1b", 1, 1)
    drawing.draw(schedule, tmp_path / "F")
    assert (tmp_path / "F").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"F\.doc: cannot draw a \.doc; use one of .*png"):
        drawing.draw(schedule, tmp_path / "F.doc")

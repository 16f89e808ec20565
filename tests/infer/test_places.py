import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from dsjax.infer import places
from dsjax.vision.grounding import Box

REPLY = "<|ref|>a [red] cat<|/ref|><|det|>[[0, 0, 500, 999], [1, 2, 3]]<|/det|>"


def test_boxes_are_shown_in_pixels_with_what_cannot_be_read():
    stream = io.StringIO()
    boxes = places.show(REPLY, (200, 100), Console(file=stream, width=90))
    assert boxes == [Box("a [red] cat", 0, 0, 500, 999)]
    shown = stream.getvalue()
    assert "a [red] cat" in shown and "[1, 2, 3], which is not four numbers" in shown
    row = next(line.split() for line in shown.splitlines() if "cat" in line)
    assert row[-4:] == ["0", "0", "100", "100"]


def test_a_reply_without_places_shows_nothing():
    stream = io.StringIO()
    assert places.show("a cat", (200, 100), Console(file=stream)) == [] and not stream.getvalue()


def test_a_drawing_is_written(tmp_path):
    picture, target = tmp_path / "a.png", tmp_path / "b.png"
    PIL.Image.new("RGB", (200, 100)).save(picture)
    places.check_target(target, [picture])
    places.save(target, picture, [Box("", 0, 0, 500, 999)])
    pixels = np.asarray(PIL.Image.open(target))
    assert pixels.shape == (100, 200, 3) and (pixels[50, 0] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("target", "shown", "said"),
    [
        ("b.png", [], "--boxes b.png draws places that a reply names in a picture; add --image"),
        ("b.jpg", ["a.png"], "is written as PNG"),
        ("none/b.png", ["a.png"], "none is not a folder"),
        ("a.png", ["./a.png"], "is a picture that is shown"),
    ],
)
def test_a_drawing_that_cannot_be_is_refused_first(target, shown, said):
    with pytest.raises(ValueError) as caught:
        places.check_target(Path(target), [Path(each) for each in shown])
    assert said in str(caught.value)


def test_a_reply_without_places_is_not_drawn(tmp_path):
    with pytest.raises(ValueError, match="the reply names no place"):
        places.save(tmp_path / "b.png", tmp_path / "a.png", [])
    assert not list(tmp_path.iterdir())

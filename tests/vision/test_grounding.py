import numpy as np
import PIL.Image
import pytest

from dsjax.vision.grounding import Box, draw, read


def said(label, *boxes):
    return f"<|ref|>{label}<|/ref|><|det|>[{', '.join(map(str, boxes))}]<|/det|>"


def test_names_and_boxes_are_read_in_order():
    giraffes, grass = (
        said("a giraffe", [1, 2, 3, 4], [0, 0, 999, 999]),
        said(" \u8349 ", [5, 6, 7, 8]),
    )
    reply = f"Here {giraffes} and {grass}."
    assert read(reply) == (
        [Box("a giraffe", 1, 2, 3, 4), Box("a giraffe", 0, 0, 999, 999), Box("\u8349", 5, 6, 7, 8)],
        [],
    )


def test_a_name_may_span_lines_and_be_missing():
    assert read("<|det|>[[1,2,3,4]]<|/det|>") == ([Box("", 1, 2, 3, 4)], [])
    assert read(said("a\nb", [1, 2, 3, 4]))[0] == [Box("a\nb", 1, 2, 3, 4)]


def test_text_without_places_and_unfinished_ones_have_none():
    assert read("No [[1, 2, 3, 4]] here.") == ([], [])
    assert read("<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]") == ([], [])


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("[[555549, 269, 1, 2]]", "[555549, 269, 1, 2], which is not four numbers from 0 to 999"),
        ("[[1, 2, 3]]", "[1, 2, 3], which is not four numbers"),
        ("[[1, 2, 3, 4, 5]]", "[1, 2, 3, 4, 5], which is not four numbers"),
        ("[[1, -2, 3, 4]]", "[1, -2, 3, 4], which is not four numbers"),
        ("[[__import__('os'), 2, 3, 4]]", "which is not four numbers"),
        ("[[5, 2, 3, 4]]", "[5, 2, 3, 4], whose second corner is before its first"),
        ("left", "'left', which is no list of boxes"),
        ("[]", "'[]', which is no list of boxes"),
        ("[[" + "9" * 9000, "which is no list of boxes"),
    ],
)
def test_what_is_no_box_is_said_and_the_rest_is_read(inside, message):
    reply = f"<|ref|>a<|/ref|><|det|>{inside}<|/det|>" + said("b", [1, 2, 3, 4])
    boxes, problems = read(reply)
    assert boxes == [Box("b", 1, 2, 3, 4)]
    assert len(problems) == 1 and problems[0].startswith("'a' is at ")
    assert message in problems[0] and len(problems[0]) < 200


def test_corners_are_parts_of_999_of_each_side():
    """Cut to whole pixels, as DeepSeek draws them."""
    assert Box("", 0, 500, 999, 998).pixels((640, 333)) == (0, 166, 640, 332)


def test_boxes_are_drawn_on_a_copy():
    picture = PIL.Image.new("RGB", (100, 60))
    drawn = draw(picture, [Box("a", 100, 100, 800, 900), Box("b", 0, 0, 999, 999)])
    pixels = np.asarray(drawn)
    assert not np.asarray(picture).any() and pixels.shape == (60, 100, 3)
    assert (pixels[30, 10:13] == (255, 0, 0)).all() and not pixels[30, 50].any()
    assert (pixels[1] == (0, 255, 0)).all()
    assert pixels[9:20, 14:30].any()  # its number

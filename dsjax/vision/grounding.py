"""Places in a picture that a reply of DeepSeek-VL2 names, and a drawing of them.

A reply says `<|ref|>a giraffe<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>`: top left and bottom
right corners, from 0 to 999 along each side of the picture as it was given, whatever its shape. Of
several pictures it is the last one, as DeepSeek's code draws it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dsjax.text.added_tokens import DET, END_DET, END_REF, REF

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST = 999
_NAMED = re.compile(
    rf"{re.escape(REF)}(.*?){re.escape(END_REF)}|{re.escape(DET)}(.*?){re.escape(END_DET)}", re.S
)
_LIST = re.compile(r"\s*\[(.*)\]\s*", re.S)
_ONE = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"\s*(\d{1,3})\s*")
_COLOURS = ("red", "lime", "dodgerblue", "orange", "magenta", "cyan", "yellow", "white")
_LINE = 3  # pixels
_LONGEST = 80  # characters of a reply in a message


class Box(NamedTuple):
    """A place in a picture, in parts of its sides from 0 to 999."""

    label: str
    x1: int
    y1: int
    x2: int
    y2: int

    def pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Returns the corners in a picture of this width and height, fractions cut off."""
        width, height = size
        return (
            int(self.x1 / _LARGEST * width),
            int(self.y1 / _LARGEST * height),
            int(self.x2 / _LARGEST * width),
            int(self.y2 / _LARGEST * height),
        )


def read(reply: str) -> tuple[list[Box], list[str]]:
    """Reads the places that a reply names.

    Returns:
      the boxes in their order, each with the last name before it ("" if there is none), and a
      message about each place that cannot be read. What a reply did not finish is left out.
    """
    boxes: list[Box] = []
    problems: list[str] = []
    label = ""
    for match in _NAMED.finditer(reply):
        if match[1] is not None:
            label = match[1].strip()
            continue
        inside = _LIST.fullmatch(match[2])
        found = _ONE.findall(inside[1]) if inside else []
        if not found:
            problems.append(f"{label!r} is at {match[2][:_LONGEST]!r}, which is no list of boxes")
        for one in found:
            corners = [_NUMBER.fullmatch(each) for each in one.split(",")]
            numbers = [int(each[1]) for each in corners if each]
            if len(numbers) != 4 or len(corners) != 4:
                problems.append(
                    f"{label!r} is at [{one[:_LONGEST]}], which is not four numbers from 0 to "
                    f"{_LARGEST}"
                )
            elif numbers[0] > numbers[2] or numbers[1] > numbers[3]:
                problems.append(f"{label!r} is at [{one}], whose second corner is before its first")
            else:
                boxes.append(Box(label, *numbers))
    return boxes, problems


def draw(picture: Image, boxes: Sequence[Box]) -> Image:
    """Returns a copy of an RGB picture with the boxes and their numbers, from 1."""
    import PIL.ImageDraw

    drawn = picture.copy()
    pen = PIL.ImageDraw.Draw(drawn)
    for number, box in enumerate(boxes):
        colour = _COLOURS[number % len(_COLOURS)]
        x1, y1, x2, y2 = box.pixels(picture.size)
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=_LINE)
        pen.text((x1 + _LINE + 1, y1 + _LINE), str(number + 1), fill=colour)
    return drawn

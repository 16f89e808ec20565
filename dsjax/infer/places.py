"""Shows the places in a picture that a reply names, as a table and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dsjax import files, tables
from dsjax.vision import grounding, pictures
from dsjax.vision.grounding import Box


def check_target(target: Path, shown: Sequence[Path]) -> None:
    """Checks where a drawing should go, before there is anything to draw.

    Raises:
      ValueError: no picture was shown, or the file could not be written there.
    """
    if not shown:
        raise ValueError(
            f"--boxes {target} draws places that a reply names in a picture; add --image and "
            "--prompt"
        )
    if target.suffix.lower() != ".png":
        raise ValueError(f"--boxes {target} is written as PNG; give a name that ends in .png")
    if not target.parent.is_dir():
        raise ValueError(f"--boxes {target}: {target.parent} is not a folder; make it first")
    if any(target.resolve() == path.resolve() for path in shown):
        raise ValueError(f"--boxes {target} is a picture that is shown; choose another name")


def show(reply: str, size: tuple[int, int], console: Console) -> list[Box]:
    """Prints the boxes that a reply names, in pixels, and what cannot be read; nothing if it names
    none.

    Args:
      size: width and height of the picture that they are in.
    """
    boxes, problems = grounding.read(reply)
    if boxes:
        rows = [[number, box.label, *box.pixels(size)] for number, box in enumerate(boxes, start=1)]
        columns = (">box", "what", ">left", ">top", ">right", ">bottom")
        console.print(tables.table("", columns, rows, wraps="what"))
    for problem in problems:
        console.print(problem, markup=False, highlight=False)
    return boxes


def save(target: Path, picture: Path, boxes: Sequence[Box]) -> None:
    """Writes a copy of a picture with its boxes as PNG.

    Raises:
      ValueError: there are none.
    """
    if not boxes:
        raise ValueError(
            f"the reply names no place, so {target} was not written; ask for one, as in "
            "--prompt '<|ref|>the cat<|/ref|>'"
        )
    drawn = grounding.draw(pictures.open_picture(picture), boxes)
    with files.replacing(target) as file:
        drawn.save(file, "PNG")

"""From a prompt to files; what draws is scripted where the codes do not matter."""

import argparse

import numpy as np
import PIL.Image
import pytest

from dsjax.checkpoint import load
from dsjax.infer import drawing
from dsjax.infer.drawing import Order, encode
from tests.vision import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("janus"))


class Scripted:
    """Draws a picture that is the code's number everywhere; the number is the seed."""

    def __init__(self):
        self.batches = []

    def codes(self, prompt, blank, samplings, *, guidance, progress):
        progress(1, 1)
        self.batches.append([each.seed for each in samplings])
        return np.array([[[each.seed]] for each in samplings], np.int32)

    def pixels(self, codes):
        return np.broadcast_to(codes[..., None], (len(codes), 4, 4, 3)).astype(np.uint8)


@pytest.fixture
def drawer(monkeypatch):
    scripted = Scripted()
    monkeypatch.setattr(drawing, "_open_drawer", lambda *arguments: scripted)
    return scripted


def run(folder, out, **options):
    defaults = {"prompt": "a cat", "n": 3, "guidance": 5.0, "temperature": 1.0, "seed": 7}
    defaults |= {"max_batch": 2, "mesh": {}, "dtype": None, "override": []}
    drawing.run(argparse.Namespace(checkpoint=folder, out=out, **defaults | options))


def test_pictures_say_how_they_were_made(folder, tmp_path, drawer):
    run(folder, tmp_path / "out")
    assert drawer.batches == [[7, 8], [9]]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["7.png", "8.png", "9.png", "sheet.png"]
    with PIL.Image.open(tmp_path / "out" / "8.png") as picture:
        assert picture.getpixel((0, 0)) == (8, 8, 8)
        assert picture.text == {
            "prompt": "a cat", "model": folder.name, "seed": "8", "guidance": "5.0",
            "temperature": "1.0", "software": "dsjax",
        }  # fmt: skip


def test_a_sheet_shows_all_pictures(folder, tmp_path, drawer):
    run(folder, tmp_path)
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (16, 16)
        corners = [sheet.getpixel(place)[0] for place in ((0, 0), (12, 0), (0, 12), (12, 12))]
    assert corners == [7, 8, 9, 255]


def test_one_picture_has_no_sheet(folder, tmp_path, drawer):
    run(folder, tmp_path, n=1)
    assert [path.name for path in tmp_path.iterdir()] == ["7.png"]


def test_what_is_drawn_is_not_drawn_again(folder, tmp_path, drawer, capsys):
    run(folder, tmp_path, n=2)
    run(folder, tmp_path, n=4)
    assert drawer.batches == [[7, 8], [9, 10]]
    assert "4 pictures, 2 of them new" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"prompt": "a dog"}, {"guidance": 2.0}])
def test_other_pictures_are_not_overwritten(folder, tmp_path, drawer, options):
    run(folder, tmp_path)
    with pytest.raises(ValueError, match=r"7\.png is not the picture that would be drawn there"):
        run(folder, tmp_path, **options)


def test_a_file_that_is_no_picture_is_not_overwritten(folder, tmp_path, drawer):
    (tmp_path / "7.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not one of ours"):
        run(folder, tmp_path)


def test_the_text_alone_is_blanked_out(folder):
    prompt, blank = encode(load.open_checkpoint(folder), "a cat")
    control = toy.CONTROL
    assert prompt[0] == blank[0] == 0
    assert prompt[-1] == blank[-1] == control["<begin_of_image>"]
    assert blank[1:-1] == [2] * (len(prompt) - 2)
    assert prompt[1] == control["<|User|>"] and prompt[-3] == control["<|Assistant|>"]


def test_a_long_prompt_leaves_no_room(folder):
    with pytest.raises(ValueError, match=r"and a picture of 4 exceed model\.max_seq_len=512"):
        encode(load.open_checkpoint(folder), "x" * 520)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"n": 0}, "n=0"),
        ({"guidance": 0.5}, "guidance=0.5 must be finite and at least 1"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"seed": -1}, "seed=-1 must lie in"),
    ],
)
def test_impossible_orders_are_refused(options, said):
    with pytest.raises(ValueError) as caught:
        Order(**{"prompt": "x"} | options)
    assert said in str(caught.value)


def test_a_checkpoint_that_cannot_draw_is_refused(folder, monkeypatch):
    monkeypatch.setattr(drawing, "open_format", lambda checkpoint: None)
    with pytest.raises(ValueError, match="cannot draw; name a checkpoint of Janus"):
        encode(load.open_checkpoint(folder), "x")

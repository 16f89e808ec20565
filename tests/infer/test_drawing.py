"""From a prompt to files; what draws is scripted where the codes do not matter."""

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from dsjax.checkpoint import load
from dsjax.checkpoint.vae import parts as vae_parts
from dsjax.checkpoint.vae import read as read_vae
from dsjax.infer import drawing
from dsjax.infer.drawing import Order, blanked, drawing_format, encode
from tests.checkpoint.test_vae import tensors as vae_tensors
from tests.checkpoint.test_vae import write as write_vae
from tests.golden.janusflow import VAE_CONFIG
from tests.vision import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("janus"))


class Scripted:
    """Draws a picture that is the seed's number everywhere."""

    def __init__(self):
        self.batches = []

    def __call__(self, seeds, progress):
        progress(1, 1)
        self.batches.append([*seeds])
        number = np.array(seeds, np.uint8)[:, None, None, None]
        return np.broadcast_to(number, (len(seeds), 4, 4, 3))


@pytest.fixture
def drawer(monkeypatch):
    scripted = Scripted()
    monkeypatch.setattr(drawing, "_open_artist", lambda *arguments: scripted)
    return scripted


def run(folder, out, **options):
    defaults = {"prompt": "a cat", "n": 3, "guidance": None, "temperature": None, "seed": 7}
    defaults |= {"steps": None, "vae": None}
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
    checkpoint = load.open_checkpoint(folder)
    form = drawing_format(checkpoint)
    prompt = encode(checkpoint, form, "a cat")
    blank = blanked(form, prompt)
    control = toy.CONTROL
    assert prompt[0] == blank[0] == 0
    assert prompt[-1] == blank[-1] == control["<begin_of_image>"]
    assert blank[1:-1] == [2] * (len(prompt) - 2)
    assert prompt[1] == control["<|User|>"] and prompt[-3] == control["<|Assistant|>"]


def test_a_long_prompt_leaves_no_room(folder):
    with pytest.raises(ValueError, match=r"and a picture of 4 exceed model\.max_seq_len=512"):
        run(folder, Path("unused"), prompt="x" * 520)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"n": 0}, "n=0"),
        ({"guidance": 0.5}, "guidance=0.5 must lie in [1, 1000]"),
        ({"guidance": 1e39}, "guidance=1e+39"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"steps": 0}, "steps=0 must be at least 1"),
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
        drawing_format(load.open_checkpoint(folder))


@pytest.fixture
def flowing(tmp_path, monkeypatch):
    """JanusFlow of 2 x 2 positions, whose pictures are of 8 x 8 pixels."""
    toy.shrink_deepseeks(monkeypatch)
    return toy.write(tmp_path / "flow", "multi_modality", toy.flowing())


@pytest.fixture
def vae(tmp_path):
    return write_vae(tmp_path / "vae", vae_tensors())


def test_janusflow_draws_through_the_same_command(flowing, vae, tmp_path):
    """Whole, with its own choices; what is drawn is not drawn again."""
    out = tmp_path / "out"
    run(flowing, out, vae=vae, n=2, steps=2)
    with PIL.Image.open(out / "8.png") as picture:
        assert picture.size == (8, 8) and len(np.unique(picture)) > 8
        assert picture.text == {
            "prompt": "a cat", "model": "flow", "seed": "8", "guidance": "2.0", "steps": "2",
            "software": "dsjax",
        }  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in out.glob("[78].png")}
    run(flowing, out, vae=vae, n=2, steps=2)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    with pytest.raises(ValueError, match=r"7\.png is not the picture that would be drawn there"):
        run(flowing, out, vae=vae, n=2)


def test_a_flow_needs_a_vae(flowing, tmp_path):
    with pytest.raises(ValueError, match=r"of stabilityai/sdxl-vae, and add --vae FOLDER"):
        run(flowing, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_of_the_other_kind_are_refused(folder, flowing, vae, tmp_path):
    with pytest.raises(ValueError, match=r"--temperature does not apply .* draws by a flow"):
        run(flowing, tmp_path, vae=vae, temperature=1.0)
    for name, value in (("steps", 3), ("vae", vae)):
        with pytest.raises(ValueError, match=f"--{name} does not apply .* that draws codes"):
            run(folder, tmp_path, **{name: value})


def test_a_vae_of_other_latents_is_refused(flowing, tmp_path):
    config = VAE_CONFIG | {"latent_channels": 16}
    parts = vae_parts(read_vae(config))
    ones = {part.name: np.ones(part.shape, np.float32) for part in parts}
    other = write_vae(tmp_path / "vae", ones, config)
    with pytest.raises(ValueError, match="has 16 numbers per latent, and the model draws 4"):
        run(flowing, tmp_path, vae=other)


def test_pictures_go_into_a_folder(folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not a folder, which --out names"):
        run(folder, tmp_path / "a.png")

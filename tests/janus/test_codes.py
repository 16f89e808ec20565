"""Codes are the tokenizer's, made once, and made anew for other pictures or weights."""

import jax
import numpy as np
import PIL.Image
import pytest

from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.load import open_checkpoint
from dsjax.janus import codes
from dsjax.janus.pairs import Picture
from tests.vision import toy


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    folder = toy.write(tmp_path_factory.mktemp("janus") / "base")
    return load_eyes(open_checkpoint(folder), dtype=np.float32).pencil.vq


@pytest.fixture
def shown(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(18):  # more than are encoded together
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return [Picture(str(tmp_path / f"{number}.png")) for number in range(18)]


def test_codes_are_those_of_each_picture_alone(vq, shown, tmp_path):
    found = codes.codes_of(shown, vq, 2, tmp_path / "cache")
    assert found.shape == (18, 4) and found.dtype == np.int32 and len(np.unique(found)) > 4
    for picture, own in zip(shown, found, strict=True):
        pixels = np.asarray(PIL.Image.open(picture.path), np.float32) / 127.5 - 1
        np.testing.assert_array_equal(vq.encode(pixels[None])[0].ravel(), own)


def test_codes_are_made_once(vq, shown, tmp_path, monkeypatch):
    found = codes.codes_of(shown, vq, 2, tmp_path / "cache")
    monkeypatch.setattr(codes.pictures, "decode", None)  # would fail
    np.testing.assert_array_equal(codes.codes_of(shown, vq, 2, tmp_path / "cache"), found)
    (kept,) = (tmp_path / "cache").iterdir()
    assert np.load(kept).dtype == np.uint8  # 40 codes


@pytest.mark.parametrize("change", ["picture", "order", "weights"])
def test_codes_of_anything_else_are_others(vq, shown, tmp_path, change):
    codes.codes_of(shown, vq, 2, tmp_path / "cache")
    if change == "picture":
        PIL.Image.new("RGB", (4, 4)).save(shown[3].path)
    elif change == "order":
        shown = shown[::-1]
    else:
        vq = jax.tree.map(lambda leaf: leaf + 0.01, vq)
    codes.codes_of(shown, vq, 2, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_bad_picture_is_named_and_nothing_is_kept(vq, shown, tmp_path):
    (tmp_path / "17.png").write_bytes(b"GIF no more")
    with pytest.raises(ValueError, match=r"17.png is not a picture in PNG"):
        codes.codes_of(shown, vq, 2, tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())

"""Encodings are the autoencoder's, made once, and made anew for other pictures or weights."""

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from dsjax.janus import encodings
from dsjax.janus.encodings import Encoder, made_once
from dsjax.janus.pairs import Picture

COUNT = 7


def encoder(weight=2.0):
    """The mean of each colour, times a weight."""
    return Encoder(
        "means",
        jnp.float32(weight),
        lambda weight, pixels: weight * pixels.mean(axis=(1, 2)),
        size=4,
        shape=(3,),
        dtype=np.dtype(np.float32),
        at_once=3,
    )


@pytest.fixture
def shown(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return [Picture(str(tmp_path / f"{number}.png")) for number in range(COUNT)]


def test_encodings_are_those_of_each_picture_in_its_place(shown, tmp_path):
    told = []
    found = made_once(shown, encoder(), tmp_path / "cache", lambda *done: told.append(done))
    assert told == [(0, COUNT), (3, COUNT), (6, COUNT), (COUNT, COUNT)]
    for picture, own in zip(shown, found, strict=True):
        pixels = np.asarray(PIL.Image.open(picture.path), np.float32) / 127.5 - 1
        np.testing.assert_allclose(own, 2 * pixels.mean((0, 1)), atol=1e-6)


def test_what_is_kept_is_mapped_and_no_picture_is_read_again(shown, tmp_path, monkeypatch):
    found = made_once(shown, encoder(), tmp_path / "cache")
    assert isinstance(found, np.memmap) and not found.flags.writeable
    monkeypatch.setattr(encodings.pictures, "decode", None)  # would fail
    np.testing.assert_array_equal(made_once(shown, encoder(), tmp_path / "cache"), found)


@pytest.mark.parametrize("change", ["picture", "order", "weights"])
def test_encodings_of_anything_else_are_others(shown, tmp_path, change):
    made_once(shown, encoder(), tmp_path / "cache")
    own = encoder()
    if change == "picture":
        PIL.Image.new("RGB", (4, 4)).save(shown[3].path)
    elif change == "order":
        shown = shown[::-1]
    else:
        own = encoder(2.1)
    made_once(shown, own, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_bad_picture_is_named_and_nothing_is_kept(shown, tmp_path):
    (tmp_path / f"{COUNT - 1}.png").write_bytes(b"GIF no more")
    with pytest.raises(ValueError, match=r"6.png is not a picture in PNG"):
        made_once(shown, encoder(), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())

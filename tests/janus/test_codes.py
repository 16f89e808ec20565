"""Codes are the tokenizer's own, and stored in few bytes."""

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


def test_codes_are_those_of_each_picture_alone(vq, tmp_path):
    rng, shown = np.random.default_rng(0), []
    for number in range(18):  # more than are encoded together
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        shown.append(Picture(str(tmp_path / f"{number}.png")))
    found = codes.codes_of(shown, vq, 2, tmp_path / "cache")
    assert found.shape == (18, 4) and found.dtype == np.int32 and len(np.unique(found)) > 4
    for picture, own in zip(shown, found, strict=True):
        pixels = np.asarray(PIL.Image.open(picture.path), np.float32) / 127.5 - 1
        np.testing.assert_array_equal(vq.encode(pixels[None])[0].ravel(), own)
    (kept,) = (tmp_path / "cache").iterdir()
    assert np.load(kept).dtype == np.uint8  # 40 codes

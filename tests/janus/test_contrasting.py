"""Rows of captions are distinct and cover all pictures, and what a tower learns is kept."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.janus import TowerTraining
from dsjax.config.posttraining import TuningConfig
from dsjax.config.vision import SiglipConfig
from dsjax.janus import contrasting
from dsjax.janus.pairs import Picture
from dsjax.model.parameters import initialize

TOWER = SiglipConfig(image_size=8, patch_size=4, dim=8, n_layers=1, n_heads=2, inter_dim=8)
CONFIG = TowerTraining(
    name="tower",
    tower=TOWER,
    vocab_size=9,
    train=TuningConfig(
        steps=4, batch_size=3, log_every=1, eval_every=0, checkpoint_every=2, tensorboard=False
    ),
    optim=OptimConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.0),
    precision=PrecisionConfig(compute="float32"),
)
CAPTIONS = ((1, 2), (1, 3, 4), (2,), (5, 8))


@pytest.fixture
def contrast():
    contrast = initialize(contrasting.declared_contrast(CONFIG), jax.random.key(0))
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), contrast
    )


@pytest.fixture
def shown(tmp_path):
    """Two to five pictures of a caption, each of one grey of its own."""
    found, grey = {}, 0
    for n, ids in enumerate(CAPTIONS, 2):
        paths = [tmp_path / f"{n}_{number}.png" for number in range(n)]
        for path in paths:
            PIL.Image.new("RGB", (8, 8), (grey,) * 3).save(path)
            grey += 1
        found[ids] = [Picture(str(path)) for path in paths]
    return found


def taken(rows, first, count):
    """(caption, grey) of rows."""
    return [
        (tuple(row["ids"][row["ids"] != contrasting.NO_WORD]), int(row["pictures"][0, 0, 0]))
        for row in (rows[number] for number in range(first, first + count))
    ]


def test_captions_of_a_batch_are_distinct_and_change(shown):
    rows = contrasting.CaptionedRows(shown, 8, batch_size=3, seed=0)
    batches = [taken(rows, 3 * step, 3) for step in range(12)]
    captions = [{caption for caption, _ in batch} for batch in batches]
    assert all(len(each) == 3 for each in captions)
    assert len(set(map(frozenset, captions))) == len(CAPTIONS)  # each is left out now and then
    greys = {ids: {grey_of(picture) for picture in shown[ids]} for ids in CAPTIONS}
    assert all(grey in greys[caption] for batch in batches for caption, grey in batch)
    assert rows[5]["ids"].shape == (3,) and rows[5]["ids"].dtype == np.int32


def grey_of(picture):
    with PIL.Image.open(picture.path) as opened:
        return int(np.asarray(opened)[0, 0, 0])


def test_every_picture_of_a_caption_comes_before_one_comes_again(shown):
    rows = contrasting.CaptionedRows(shown, 8, batch_size=4, seed=3)
    for ids, pictures in shown.items():
        n = len(pictures)
        greys = [grey for caption, grey in taken(rows, 0, 4 * 2 * n) if caption == ids]
        assert len(set(greys[:n])) == len(set(greys[n:])) == n
    assert rows.epochs(7) == 7 / 14
    other = contrasting.CaptionedRows(shown, 8, batch_size=4, seed=4)
    assert taken(rows, 0, 20) != taken(other, 0, 20)
    assert taken(rows, 0, 20) == taken(rows, 0, 20)


def test_more_pictures_than_captions_are_refused(shown):
    with pytest.raises(
        ValueError, match=r"batch of 5 pictures .* as many captions, and there are 4"
    ):
        contrasting.CaptionedRows(shown, 8, batch_size=5, seed=0)


def test_vectors_have_length_one_and_ends_of_captions_say_nothing(contrast):
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    pictures = contrast.pictures(pixels)
    ids = jnp.array([[1, 4, -1, -1], [2, 8, 3, -1]])
    captions = contrast.captions(ids)
    for found in (pictures, captions):
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(captions[:1], contrast.captions(ids[:1, :2]), rtol=1e-5)
    words = np.asarray(contrast.embed[...])[[1, 4]].mean(0)
    want = np.asarray(contrast.said(jnp.asarray(words)))
    np.testing.assert_allclose(captions[0], want / np.linalg.norm(want), rtol=1e-4, atol=1e-6)
    features = np.asarray(contrast.tower(pixels)).mean(1)
    want = np.asarray(contrast.seen(jnp.asarray(features)))
    want = want / np.linalg.norm(want, axis=-1, keepdims=True)
    np.testing.assert_allclose(pictures, want, rtol=1e-4, atol=1e-6)
    found = contrast.loss(pixels, ids[:2])
    scale, bias = np.exp(float(contrast.log_scale[...])), float(contrast.bias[...])
    want = scale * np.asarray(pictures) @ np.asarray(captions).T + bias
    np.testing.assert_allclose(found.logits_BB, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_a_run_learns_is_read_back(shown, tmp_path):
    out = Console(file=io.StringIO())
    run = tmp_path / "run"
    assert not contrasting.train(CONFIG, shown, run, command="x", console=out)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(0 <= line["matched"] <= 1 for line in lines)
    tower = contrasting.trained(CONFIG, run)
    first = initialize(contrasting.declared_contrast(CONFIG), jax.random.key(0)).tower
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), tower, first)
    assert all(jax.tree.leaves(moved))

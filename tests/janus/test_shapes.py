"""Pictures differ as their captions do, are told apart by rule, and are held out as pictures."""

import json

import numpy as np
import PIL.Image
import pytest

from dsjax.janus import shapes
from dsjax.text.vocabulary import open_vocabulary


@pytest.mark.heavy
def test_rule_names_every_picture_and_bears_noise():
    rng = np.random.default_rng(0)
    for number, drawn in enumerate(shapes.EVERY):
        pixels = shapes.draw(drawn, *shapes._LOOKS[number % len(shapes._LOOKS)])
        assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8
        noisy = np.clip(pixels + rng.normal(0, 40, pixels.shape), 0, 255).astype(np.uint8)
        assert shapes.named(pixels) == shapes.named(noisy) == drawn


@pytest.mark.heavy
def test_rule_is_not_deceived_by_another_colour_shape_or_place():
    red = shapes.Drawn("red", "circle", "top")
    assert red.caption == "a red circle at the top"
    for other in (
        red._replace(colour="yellow"),
        red._replace(shape="square"),
        red._replace(place="top left"),
    ):
        assert shapes.named(shapes.draw(other, 6, 0, 0)) == other != red


def test_a_word_is_a_token(tmp_path):
    shapes.tokenizer().save(str(tmp_path / "tokenizer.json"))
    coder = open_vocabulary(tmp_path, 64).coder
    assert len(coder.encode("a red circle at the top left")) == 7
    for drawn in shapes.EVERY:
        assert coder.decode(coder.encode(drawn.caption)) == drawn.caption
    assert len(coder.encode(f"{shapes.SYSTEM}\n\n")) == 3


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "EVERY", shapes.EVERY[::9])  # a place alone
        patch.setattr(shapes, "_N_CROWDS", 20)
        shapes.write_shapes(folder, seed=1, n_held_out=300)
    names = ("see", "draw", "captions", "held_out")
    return folder, {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in names
    }


@pytest.mark.heavy
def test_held_out_pictures_are_like_no_other(written):
    folder, lines = written
    content = {path.name: path.read_bytes() for path in (folder / "pictures").iterdir()}
    assert len(content) == len(set(content.values())) == 900
    held, seen = ({line["image"] for line in lines[name]} for name in ("held_out", "see"))
    assert len(held) == 300 and len(seen) == 600 and not held & seen
    assert {line["image"] for line in lines["draw"]} == seen


def test_crowds_differ_and_half_of_their_places_have_a_shape(written):
    folder, _ = written
    crowds = [np.asarray(PIL.Image.open(path)) for path in (folder / shapes.CROWDS).iterdir()]
    assert len({crowd.tobytes() for crowd in crowds}) == 20
    middles = [crowd[y, x] for crowd in crowds for y in (11, 24, 37) for x in (11, 24, 37)]
    shown = np.mean([tuple(pixel) != shapes.GREY for pixel in middles])
    assert 0.4 < shown < 0.6


@pytest.mark.heavy
def test_answers_are_true(written):
    folder, lines = written
    for line in lines["see"][:200]:
        pixels = np.asarray(PIL.Image.open(folder / line["image"]))
        drawn = shapes.named(pixels)
        right = {f"What {name}?": getattr(drawn, name) for name in shapes.PROPERTIES}
        assert (right | {shapes.QUESTION: drawn.caption})[line["question"]] == line["answer"]
    asked = {line["question"] for line in lines["see"]}
    assert len(asked) == 4 and {line["question"] for line in lines["held_out"]} == {shapes.QUESTION}

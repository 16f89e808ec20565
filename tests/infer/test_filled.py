"""Pictures in the place of placeholders in given token ids, against a format's own turns."""

import dataclasses

import jax
import numpy as np
import PIL.Image
import pytest

from dsjax.checkpoint import load
from dsjax.checkpoint.eyes import load_eyes
from dsjax.infer import score
from dsjax.infer.filled import PictureFiles, fill
from dsjax.infer.looking import open_format, open_looking
from dsjax.infer.pictured import PICTURES
from dsjax.model.transformer import Embeddings
from dsjax.parallel.mesh import make_mesh
from dsjax.text.chat import Message
from dsjax.vision import pictures
from tests.closeness import LOGITS, assert_close
from tests.golden import vl2, vl7b
from tests.vision import toy

X = toy.PLACEHOLDER
# One picture, none, two; four placeholders each.
IDS = np.array([[0, 9, X, X, X, X, 8, 7, 6, 5, 4], [0, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9],
                [0, X, X, X, X, X, X, X, X, 3, 4]])  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load.open_checkpoint(toy.write(tmp_path_factory.mktemp("janus")))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Three pictures as files, and what the tower sees of them."""
    folder, squares = (
        tmp_path_factory.mktemp("shown"),
        [each.squares[0] for each in toy.pictures(3)],
    )
    paths = [folder / f"{number}.png" for number in range(3)]
    for path, square in zip(paths, squares, strict=True):
        PIL.Image.fromarray(square).save(path)
    return paths, np.stack(squares)


@pytest.fixture(scope="module")
def features(checkpoint, shown):
    """The embeddings of the three pictures, [3, tokens, D]."""
    rules = pictures.read_rules(checkpoint.path)
    return np.asarray(load_eyes(checkpoint)(pictures.normalized(shown[1], rules)))


def saved(path, squares, rules):
    np.save(path, np.moveaxis(pictures.normalized(squares, rules), -1, 1))
    return path


def test_pictures_fill_the_placeholders_of_all_rows_in_order(checkpoint, shown, features, tmp_path):
    pixels = saved(tmp_path / "P.npy", shown[1], pictures.read_rules(checkpoint.path))
    for files in (PictureFiles(shown[0]), PictureFiles(pixels=pixels)):
        first, none, last = fill(checkpoint, IDS, files, None, "float32")
        assert none is None
        np.testing.assert_array_equal(first.places, [2, 3, 4, 5])
        np.testing.assert_array_equal(last.places, range(1, 9))
        assert_close(first.values, features[0], LOGITS)
        assert_close(last.values, features[1:].reshape(8, -1), LOGITS)


@pytest.mark.parametrize("context", [1, 2])
def test_logits_follow_the_pictures(checkpoint, shown, features, context, tmp_path):
    np.save(tmp_path / "T.npy", IDS)
    found = score.score_files(
        checkpoint,
        tokens=tmp_path / "T.npy",
        pictures=PictureFiles(shown[0]),
        outputs=score.Outputs(tmp_path / "L.npy"),
        dtype="float32",
        mesh=make_mesh({"context": 2}, n_devices=2) if context > 1 else None,
    )
    given_BT = IDS == X
    values_BTD = np.zeros((*IDS.shape, 32), np.float32)
    values_BTD[given_BT] = features.reshape(12, -1)
    model = load.load(checkpoint, dtype="float32")
    hidden = model.hidden(IDS, embeddings=Embeddings(given_BT, values_BTD))
    wanted = np.asarray(model.logits(hidden.main_BTD))
    assert_close(np.load(tmp_path / "L.npy"), wanted, LOGITS)
    # Only tokens of text are predicted.
    nats = -np.asarray(jax.nn.log_softmax(wanted))[:, :-1]
    text = IDS[:, 1:] != X
    assert found.tokens == text.sum() == 18
    rows, places = np.nonzero(text)
    assert found.nats == pytest.approx(nats[rows, places, IDS[:, 1:][text]].sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        (IDS, 2, r"row 2 of the tokens has 8 placeholders, .* 0 to 1 of the .*; one fills 4"),
        (IDS[:1, :-6], 1, r"row 0 of the tokens has 3 placeholders"),
        (IDS[:2], 3, "no placeholders for the last 2 pictures"),
    ],
)
def test_pictures_and_placeholders_agree(checkpoint, shown, ids, count, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fill(checkpoint, ids, PictureFiles(shown[0][:count]))
    pixels = saved(tmp_path / "P.npy", shown[1][:count], pictures.read_rules(checkpoint.path))
    with pytest.raises(ValueError, match=r"placeholders, and \d pictures of 4 fill"):
        fill(checkpoint, ids, PictureFiles(pixels=pixels))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((1, 9, 9, 3), np.float32),
            r"of shape \(1, 9, 9, 3\), not float32 \[n, 3, 9, 9\]",
        ),
        (np.zeros((1, 3, 9, 9), np.uint8), "holds uint8"),
        (np.full((1, 3, 9, 9), np.nan, np.float32), "numbers that are not finite"),
        (np.zeros((0, 3, 9, 9), np.float32), "holds no pictures"),
    ],
)
def test_pixels_are_those_of_the_tower(checkpoint, array, message, tmp_path):
    np.save(tmp_path / "P.npy", array)
    with pytest.raises(ValueError, match=message):
        fill(checkpoint, IDS[:1], PictureFiles(pixels=tmp_path / "P.npy"))


def test_a_model_of_one_tower_takes_no_high_pixels(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="one tower alone: leave out --high-pixels"):
        fill(checkpoint, IDS, PictureFiles(pixels=tmp_path / "P", high_pixels=tmp_path / "H"))


def test_a_language_model_does_not_see(checkpoint):
    alone = dataclasses.replace(checkpoint, hf=None)
    with pytest.raises(ValueError, match="does not see; leave the pictures out"):
        fill(alone, IDS, PictureFiles())


def test_pictures_of_tiles_are_told_apart_by_their_number(tmp_path):
    """Two pictures are cut into tiles, three are not."""
    checkpoint = load.open_checkpoint(vl2.write(tmp_path / "vl2", vl2.CASES["heads"]))
    looking, paths, turns = open_looking(checkpoint, None, "float32"), [], []
    form = open_format(checkpoint)
    for name, sizes in {"b": [(44, 20), (67, 66)], "c": [(30, 75), (90, 20), (22, 22)]}.items():
        own = [tmp_path / f"{name}{place}.png" for place in range(len(sizes))]
        for path, size in zip(own, sizes, strict=True):
            vl2.picture(size).save(path)
        turns.append([Message("user", "x", {PICTURES: looking.read(own)})])
        paths += own
    rows = [looking.encode(turn) for turn in turns]
    ids = np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    found = fill(checkpoint, ids, PictureFiles(paths), None, "float32")
    for turn, row, given in zip(turns, rows, found, strict=True):
        wanted = looking.given(turn, row)
        np.testing.assert_array_equal(given.places, wanted.places)
        assert_close(given.values, wanted.values, LOGITS)
    # As the model's own pre-processing gives them: of a single tile the whole comes twice.
    shown = [each for turn in turns for each in form.shown(turn)]
    squares = [[*each.squares, *each.squares[: each.grid == (1, 1)]] for each in shown]
    assert [len(some) for some in squares] == [3, 10, 2, 2, 2]
    pixels = saved(tmp_path / "P.npy", np.concatenate(squares), form.rules)
    again = fill(checkpoint, ids, PictureFiles(pixels=pixels), None, "float32")
    for given, wanted in zip(again, found, strict=True):
        np.testing.assert_array_equal(given.places, wanted.places)
        assert_close(given.values, wanted.values, LOGITS)
    pixels = saved(tmp_path / "P.npy", np.concatenate(squares[1:]), form.rules)
    with pytest.raises(ValueError, match=r"placeholders for 19 squares, .* pixels of 16"):
        fill(checkpoint, ids, PictureFiles(pixels=pixels))
    with pytest.raises(ValueError, match="50 placeholders stand beside each other"):
        fill(checkpoint, np.full((1, 50), form.image_token), PictureFiles(pixels=pixels))


def test_a_second_tower_has_pixels_of_its_own(tmp_path, monkeypatch):
    vl7b.shrink(monkeypatch)
    checkpoint = load.open_checkpoint(vl7b.write(tmp_path / "vl7b"))
    looking = open_looking(checkpoint, None, "float32")
    path = tmp_path / "a.png"
    vl7b.picture(0).save(path)
    turn = [Message("user", "x", {PICTURES: looking.read([path])})]
    ids = looking.encode(turn)
    rules = pictures.read_rules(checkpoint.path, low=vl7b.LOW)
    arrays = pictures.inputs(turn[0].fields[PICTURES][0].squares, rules)
    files = PictureFiles((), tmp_path / "P.npy", tmp_path / "H.npy")
    for each, array in zip(files[1:], arrays, strict=True):
        np.save(each, np.moveaxis(array, -1, 1))
    (given,) = fill(checkpoint, np.array([ids]), files, None, "float32")
    assert_close(given.values, looking.given(turn, ids).values, LOGITS)
    with pytest.raises(ValueError, match=r"has a second tower: give --high-pixels H\.npy"):
        fill(checkpoint, np.array([ids]), PictureFiles(pixels=files.pixels))


@pytest.mark.parametrize("name", ["images", "pixels"])
def test_logits_do_not_replace_the_pictures(checkpoint, shown, tmp_path, name):
    np.save(tmp_path / "T.npy", IDS[:1])
    path = tmp_path / "picture"
    path.write_bytes(shown[0][0].read_bytes())
    given = PictureFiles(**{name: [path] if name == "images" else path})
    with pytest.raises(ValueError, match="picture is named twice"):
        score.score_files(
            checkpoint,
            tokens=tmp_path / "T.npy",
            pictures=given,
            outputs=score.Outputs(logits=path),
        )
    assert path.read_bytes() == shown[0][0].read_bytes()

"""What replaces the placeholders of pictures in a conversation."""

import types

import numpy as np
import pytest

from dsjax.checkpoint import load
from dsjax.checkpoint.eyes import load_eyes
from dsjax.infer import looking as module
from dsjax.infer.looking import batches, open_format, open_looking
from dsjax.infer.pictured import PICTURES
from dsjax.parallel.mesh import make_mesh
from dsjax.text.chat import Message
from dsjax.vision import pictures
from tests.closeness import LOGITS, assert_close
from tests.vision import toy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load.open_checkpoint(toy.write(tmp_path_factory.mktemp("janus")))


def test_pictures_of_another_size_are_refused(tmp_path):
    folder = toy.write(tmp_path, size={"height": 8, "width": 8})
    with pytest.raises(ValueError, match="make them 8 pixels large, and the model sees 9"):
        open_format(load.open_checkpoint(folder))


def test_a_language_model_alone_has_no_such_format():
    alone = types.SimpleNamespace(hf=None)
    assert open_format(alone) is None and open_looking(alone, None, None) is None


def test_features_replace_the_placeholders_in_order(checkpoint):
    looking, shown = open_looking(checkpoint, None, "float32"), toy.pictures(3)
    messages = [
        Message("user", "a", {PICTURES: [shown[0], shown[1]]}),
        Message("assistant", "b"),
        Message("user", "c", {PICTURES: [shown[2], shown[0]]}),
    ]
    prompt = looking.encode(messages)
    given = looking.given(messages, prompt)
    eyes, rules = load_eyes(checkpoint), pictures.read_rules(checkpoint.path)
    wanted = np.asarray(
        eyes(pictures.normalized(np.concatenate([each.squares for each in shown]), rules))
    )
    assert_close(given.values, wanted[[0, 1, 2, 0]].reshape(16, 32), LOGITS)
    np.testing.assert_array_equal(given.places, np.flatnonzero(np.array(prompt) == toy.PLACEHOLDER))
    assert looking.given([Message("user", "a")], [1, 2]) is None


def test_a_picture_is_looked_at_once(checkpoint, monkeypatch):
    looking, shown = open_looking(checkpoint, None, "float32"), toy.pictures(3)
    batches = []
    run = looking._run
    monkeypatch.setattr(looking, "_run", lambda some: batches.append(len(some)) or run(some))
    for n in (2, 3):
        turn = [Message("user", "a", {PICTURES: [*shown[:n], shown[0]]})]
        looking.given(turn, looking.encode(turn))
    assert batches == [2, 1]


def test_a_mesh_sees_the_same(checkpoint):
    turn = [Message("user", "a", {PICTURES: toy.pictures(1)})]
    mesh = make_mesh({"data": 4, "tensor": 2}, n_devices=8)
    one, many = (open_looking(checkpoint, each, "float32") for each in (None, mesh))
    prompt = one.encode(turn)
    assert_close(many.given(turn, prompt).values, one.given(turn, prompt).values, LOGITS)


def test_a_tokenizer_without_the_tokens_of_a_picture_is_refused(tmp_path, monkeypatch):
    folder = toy.write(tmp_path)
    monkeypatch.setattr(module, "END", "<no_such_token>")
    with pytest.raises(ValueError, match="the tokenizer has no <no_such_token>"):
        open_format(load.open_checkpoint(folder))


@pytest.mark.parametrize(
    ("n", "unit", "sizes"),
    [
        (0, 1, []),
        (1, 1, [1]),
        (10, 1, [8, 2]),
        (31, 1, [16, 8, 4, 2, 1]),
        (40, 1, [16, 16, 8]),
        (7, 4, [8]),  # one of them for nothing
        (9, 4, [8, 4]),
        (33, 4, [16, 16, 4]),
        (5, 32, [32]),
        (13, 3, [12, 3]),
    ],
)
def test_batches_have_few_sizes(n, unit, sizes):
    assert batches(n, unit) == sizes


def test_every_size_of_batch_is_warmed(checkpoint, monkeypatch):
    looking, seen = open_looking(checkpoint, None, "float32"), []
    monkeypatch.setattr(looking, "_run", lambda squares: seen.append(len(squares)))
    assert len(list(looking.warm())) == 5 and seen == [1, 2, 4, 8, 16]
    looking._mesh = make_mesh({"data": 4, "tensor": 2}, n_devices=8)
    assert len(list(looking.warm())) == 3 and seen[5:] == [4, 8, 16]


def test_a_begin_token_of_janusflow_is_filled_too(tmp_path, monkeypatch):
    toy.shrink_deepseeks(monkeypatch)
    folder = toy.write(tmp_path, "multi_modality", toy.flowing())
    checkpoint = load.open_checkpoint(folder)
    looking = open_looking(checkpoint, None, None)
    turn = Message("user", "what?", {PICTURES: toy.pictures(2)})
    ids = looking.encode([turn])
    given = looking.given([turn], ids)
    begin_token = toy.CONTROL["<begin_of_image>"]
    filled = np.flatnonzero(np.isin(ids, [begin_token, toy.PLACEHOLDER]))
    assert len(filled) == 10 and ids[filled[0]] == ids[filled[5]] == begin_token
    np.testing.assert_array_equal(given.places, filled)
    begin = np.asarray(load_eyes(checkpoint).begin[...])
    np.testing.assert_array_equal(given.values[[0, 5]], [begin, begin])
    spelt = open_format(checkpoint).vocabulary.coder.decode(ids, skip_special=False)
    assert spelt.count("<|User|>: ") == 1

"""Conversations with pictures: their ids, and what replaces the placeholders."""

import types

import numpy as np
import PIL.Image
import pytest

from dsjax.checkpoint import load
from dsjax.checkpoint.eyes import load_eyes
from dsjax.files import write_json
from dsjax.infer import pictured
from dsjax.infer.pictured import PICTURES, SYSTEM, open_format, open_looking
from dsjax.parallel.mesh import make_mesh
from dsjax.text.chat import Message
from dsjax.vision import pictures
from tests.closeness import LOGITS, assert_close
from tests.vision import toy

BOS, EOS, _, USER, ASSISTANT, BEGIN, END, PLACEHOLDER = toy.CONTROL.values()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load.open_checkpoint(toy.write(tmp_path_factory.mktemp("janus")))


@pytest.fixture(scope="module")
def form(checkpoint):
    return open_format(checkpoint)


def squares(n, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (n, 9, 9, 3), np.uint8))


def spelt(form, ids):
    """Ids as Janus' processor would spell them."""
    return form.vocabulary.coder.decode(ids, skip_special=False)


def test_a_conversation_is_spelt_as_janus_was_trained(form):
    messages = [
        Message("user", " what? ", {PICTURES: squares(2)}),
        Message("assistant", "a cat"),
        Message("user", "<|User|> sure?"),
    ]
    ids = form.encode(messages)
    picture = "<begin_of_image>" + 4 * "<image_placeholder>" + "<end_of_image>"
    assert spelt(form, ids) == (
        f"{toy.BOS}{SYSTEM}\n\n<|User|>: {picture}\n{picture}\nwhat?\n\n<|Assistant|>: a cat"
        f"{toy.EOS}<|User|>: <|User|> sure?\n\n<|Assistant|>:"
    )
    # What a user writes is text, even if it spells a role.
    assert ids.count(USER) == 2 and ids.count(ASSISTANT) == 2 and ids.count(PLACEHOLDER) == 8
    assert ids[0] == BOS and ids.count(EOS) == 1 and ids.count(BEGIN) == ids.count(END) == 2


def test_a_system_message_replaces_the_usual_one_and_may_be_empty(form):
    own = form.encode([Message("system", "Rhyme."), Message("user", "x")])
    assert spelt(form, own) == f"{toy.BOS}Rhyme.\n\n<|User|>: x\n\n<|Assistant|>:"
    none = form.encode([Message("system", ""), Message("user", "x")])
    assert spelt(form, none) == f"{toy.BOS}<|User|>: x\n\n<|Assistant|>:"


def test_thinking_is_refused(form):
    with pytest.raises(ValueError, match="omit --thinking"):
        form.encode([Message("user", "x")], thinking=True)


def test_older_releases_spell_roles_out(tmp_path):
    folder = toy.write(tmp_path)
    write_json(folder / "processor_config.json", {"sft_format": "deepseek_old"})
    old = open_format(load.open_checkpoint(folder))
    said = spelt(old, old.encode([Message("system", ""), Message("user", "x")]))
    assert said == f"{toy.BOS}User: x\n\nAssistant:"


def test_pictures_of_another_size_are_refused(tmp_path):
    folder = toy.write(tmp_path, size={"height": 8, "width": 8})
    with pytest.raises(ValueError, match="pictures of 8 pixels, and the model sees 9"):
        open_format(load.open_checkpoint(folder))


def test_a_language_model_alone_has_no_such_format():
    alone = types.SimpleNamespace(hf=None)
    assert open_format(alone) is None and open_looking(alone, None, None) is None


def test_features_replace_the_placeholders_in_order(checkpoint, form):
    looking, shown = open_looking(checkpoint, None, "float32"), squares(3)
    messages = [
        Message("user", "a", {PICTURES: [shown[0], shown[1]]}),
        Message("assistant", "b"),
        Message("user", "c", {PICTURES: [shown[2], shown[0]]}),
    ]
    prompt = looking.encode(messages)
    given = looking.given(messages, prompt)
    eyes, rules = load_eyes(checkpoint), pictures.read_rules(checkpoint.path)
    wanted = np.asarray(eyes(pictures.normalized(np.stack(shown), rules)))
    assert_close(given.values, wanted[[0, 1, 2, 0]].reshape(16, 32), LOGITS)
    np.testing.assert_array_equal(given.places, np.flatnonzero(np.array(prompt) == PLACEHOLDER))
    assert looking.given([Message("user", "a")], [1, 2]) is None


def test_a_picture_is_looked_at_once(checkpoint, monkeypatch):
    looking, shown = open_looking(checkpoint, None, "float32"), squares(3)
    batches = []
    run = looking._run
    monkeypatch.setattr(looking, "_run", lambda some: batches.append(len(some)) or run(some))
    for n in (2, 3):
        turn = [Message("user", "a", {PICTURES: [*shown[:n], shown[0]]})]
        looking.given(turn, looking.encode(turn))
    assert batches == [2, 1]


def test_a_mesh_sees_the_same(checkpoint):
    turn = [Message("user", "a", {PICTURES: squares(1)})]
    mesh = make_mesh({"data": 4, "tensor": 2}, n_devices=8)
    one, many = (open_looking(checkpoint, each, "float32") for each in (None, mesh))
    prompt = one.encode(turn)
    assert_close(many.given(turn, prompt).values, one.given(turn, prompt).values, LOGITS)


def test_files_become_squares(form, tmp_path):
    PIL.Image.new("RGB", (4, 2), "white").save(tmp_path / "a.png")
    (got,) = form.read([tmp_path / "a.png"])
    assert got.shape == (9, 9, 3) and got.dtype == np.uint8 and (got[4] == 255).all()


def test_a_tokenizer_without_the_tokens_of_a_picture_is_refused(tmp_path, monkeypatch):
    folder = toy.write(tmp_path)
    monkeypatch.setattr(pictured, "END", "<no_such_token>")
    with pytest.raises(ValueError, match="the tokenizer has no <no_such_token>"):
        open_format(load.open_checkpoint(folder))


def test_a_begin_token_of_janusflow_is_filled_too(tmp_path, monkeypatch):
    toy.shrink_deepseeks(monkeypatch)
    folder = toy.write(tmp_path, "multi_modality", toy.flowing())
    checkpoint = load.open_checkpoint(folder)
    looking = open_looking(checkpoint, None, None)
    turn = Message("user", "what?", {PICTURES: squares(2)})
    ids = looking.encode([turn])
    given = looking.given([turn], ids)
    filled = np.flatnonzero(np.isin(ids, [BEGIN, PLACEHOLDER]))
    assert len(filled) == 10 and ids[filled[0]] == ids[filled[5]] == BEGIN
    np.testing.assert_array_equal(given.places, filled)
    begin = np.asarray(load_eyes(checkpoint).begin[...])
    np.testing.assert_array_equal(given.values[[0, 5]], [begin, begin])
    assert spelt(open_format(checkpoint), ids).count("<|User|>: ") == 1

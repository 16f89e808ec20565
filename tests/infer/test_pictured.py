"""Conversations with pictures: their ids."""

import numpy as np
import PIL.Image
import pytest

from dsjax.checkpoint import load
from dsjax.files import write_json
from dsjax.infer.looking import open_format
from dsjax.infer.pictured import PICTURES, SYSTEM
from dsjax.text.chat import Message
from tests.vision import toy

BOS, EOS, _, USER, ASSISTANT, BEGIN, END, PLACEHOLDER = toy.CONTROL.values()


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    return open_format(load.open_checkpoint(toy.write(tmp_path_factory.mktemp("janus"))))


def spelt(form, ids):
    """Ids as Janus' processor would spell them."""
    return form.vocabulary.coder.decode(ids, skip_special=False)


def test_a_conversation_is_spelt_as_janus_was_trained(form):
    messages = [
        Message("user", " what? ", {PICTURES: toy.pictures(2)}),
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


def test_files_become_squares(form, tmp_path):
    PIL.Image.new("RGB", (4, 2), "white").save(tmp_path / "a.png")
    (got,) = form.read([tmp_path / "a.png"])
    (square,) = got.squares
    assert got.size == (4, 2)
    assert square.shape == (9, 9, 3) and square.dtype == np.uint8 and (square[4] == 255).all()

"""Conversations with DeepSeek-VL2 against DeepSeek's own code (tests/golden/vl2.npz)."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import load
from dsjax.files import write_json
from dsjax.generate.engine import Engine
from dsjax.generate.request import Request
from dsjax.generate.sampling import Sampling
from dsjax.infer.looking import open_format, open_looking
from dsjax.infer.pictured import PICTURES
from dsjax.model.transformer import Embeddings
from dsjax.text.chat import Message
from dsjax.vision import tiles
from dsjax.vision.pictures import Rules
from tests.closeness import F32, assert_close
from tests.golden import vl2

RULES = Rules(
    size=vl2.SIDE, resolutions=tuple((wide, high) for wide, high in vl2.resolutions(vl2.SIDE))
)


@pytest.fixture(scope="module")
def golden():
    with np.load(vl2.FILE) as file:
        return dict(file)


@pytest.fixture(scope="module", params=vl2.CASES)
def opened(request, tmp_path_factory):
    folder = vl2.write(tmp_path_factory.mktemp("vl2"), vl2.CASES[request.param])
    checkpoint = load.open_checkpoint(folder)
    return request.param, checkpoint, open_looking(checkpoint, None, "float32")


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    folder = vl2.write(tmp_path_factory.mktemp("vl2"), vl2.CASES["heads"])
    return open_format(load.open_checkpoint(folder))


def pictures(*sizes):
    return {PICTURES: [tiles.cut(vl2.picture(size), RULES, "x") for size in sizes]}


def conversation(name):
    return [
        Message(role, text, pictures(*sizes) if sizes else {})
        for role, text, sizes in vl2.CONVERSATIONS[name]
    ]


@pytest.mark.parametrize("name", vl2.CONVERSATIONS)
def test_ids_are_deepseeks(form, golden, name):
    assert form.encode(conversation(name)) == golden[f"{name}/ids"].tolist()


def test_embeddings_and_logits_are_deepseeks(opened, golden):
    case, checkpoint, looking = opened
    language = load.load(checkpoint)
    ids = np.zeros((3, 192), np.int32)  # of all three, so that one program is compiled
    mask, values = np.zeros(ids.shape, bool), np.zeros((*ids.shape, 32), np.float32)
    for row, name in enumerate(vl2.CONVERSATIONS):
        messages = conversation(name)
        prompt = looking.encode(messages)
        given = looking.given(messages, prompt)
        assert_close(given.values, golden[f"{case}/{name}/embeddings"], F32, f"{name} seen")
        ids[row, : len(prompt)] = prompt
        mask[row, given.places], values[row, given.places] = True, given.values
    embeddings = Embeddings(jnp.asarray(mask), jnp.asarray(values))
    logits = language.logits(language.hidden(jnp.asarray(ids), embeddings=embeddings).main_BTD)
    for row, name in enumerate(vl2.CONVERSATIONS):
        end = len(golden[f"{name}/ids"])
        last = np.asarray(logits[row, end - vl2.POSITIONS : end])
        assert_close(last, golden[f"{case}/{name}/logits"], F32, name)


def test_greedy_replies_are_deepseeks(opened, golden):
    """Through the engine, in chunks that no picture fits into, together."""
    case, checkpoint, looking = opened
    requests = []
    for name in vl2.CONVERSATIONS:
        messages = conversation(name)
        prompt = looking.encode(messages)
        given, greedy = looking.given(messages, prompt), Sampling(temperature=0.0)
        requests.append(Request(tuple(prompt), vl2.NEW_TOKENS, greedy, given=given))
    engine = Engine(load.load(checkpoint), prefill_chunk=16)
    replies = [list(each.tokens) for each in engine.complete(requests)]
    assert replies == [golden[f"{case}/{name}/tokens"].tolist() for name in vl2.CONVERSATIONS]


def test_pictures_come_first_unless_the_text_says_where(form):
    shown = pictures((22, 22), (44, 22))
    first = form.encode([Message("user", " what?", shown)])
    spelt = form.encode([Message("user", "<image>\n<image>\n what?", shown)])
    between = form.encode([Message("user", "a<image>b<image>", shown)])
    assert first == spelt != between and between.count(form.image_token) == 25 + 34
    with pytest.raises(ValueError, match="spells <image> 1 times and has 2 pictures"):
        form.encode([Message("user", "<image>?", shown)])
    # Without pictures it is text, as is a role.
    text = form.encode([Message("user", "<image> <|User|>")])
    control = form.vocabulary.coder.control
    assert form.image_token not in text and text.count(control["<|User|>"]) == 1


def test_marks_are_tokens_in_what_is_said(form):
    control = form.vocabulary.coder.control
    said = "<|ref|>b<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"
    ids = form.encode([Message("user", "<|grounding|>where?"), Message("assistant", said)])
    for mark in ("<|grounding|>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"):
        assert ids.count(control[mark]) == 1
    # A reply's text shows them.
    assert form.vocabulary.coder.decode(ids).count("<|") == 5


def test_an_empty_message_has_no_space(form):
    ids = form.encode([Message("user", " ")])
    assert form.vocabulary.coder.decode(ids, skip_special=False).endswith("<|User|>:<|Assistant|>:")
    with pytest.raises(ValueError, match="omit --thinking"):
        form.encode([Message("user", "a")], thinking=True)


def test_each_tile_is_looked_at_once(opened, monkeypatch):
    """Also when a third picture comes, and none is cut any more."""
    _, checkpoint, _ = opened
    looking = open_looking(checkpoint, None, "float32")
    batches, run = [], looking._run
    monkeypatch.setattr(looking, "_run", lambda some: batches.append(len(some)) or run(some))
    turns = []
    for size in ((44, 22), (22, 66), (22, 22)):
        turns.append(Message("user", "a", pictures(size)))
        looking.given(turns, looking.encode(turns))
    assert batches == [2, 1, 4, 1]


def test_files_are_cut(form, tmp_path):
    vl2.picture((30, 75)).save(tmp_path / "a.png")
    (got,) = form.read([tmp_path / "a.png"])
    (want,) = pictures((30, 75))[PICTURES]
    assert got.grid == want.grid == (2, 4) and got.size == (30, 75)
    np.testing.assert_array_equal(got.squares, want.squares)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"candidate_resolutions": [[22, 22]]}, "are not those in config.json; copy both"),
        ({"candidate_resolutions": [[9, 9]]}, "make them 9 pixels large, and the model sees 22"),
        ({"candidate_resolutions": [22]}, "is not a list of widths and heights"),
        ({"processor_class": "X"}, "the tokenizer has no <image>, <|ref|>"),
    ],
)
def test_files_of_different_releases_are_refused(tmp_path, changes, said):
    folder = vl2.write(tmp_path, vl2.CASES["heads"])
    write_json(folder / "processor_config.json", vl2.PROCESSOR | changes)
    with pytest.raises(ValueError) as caught:
        open_format(load.open_checkpoint(folder))
    assert said in str(caught.value)

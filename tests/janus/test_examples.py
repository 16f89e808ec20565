"""Examples begin as inference asks, end as a reply ends, and are counted if they have no room."""

import dataclasses
import json

import numpy as np
import pytest

from dsjax.infer.drawing import encode
from dsjax.infer.pictured import PICTURES
from dsjax.janus import examples, training
from dsjax.text.chat import Message
from dsjax.vision.pictures import Picture
from tests.golden import vl2
from tests.janus import toy


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("janus"))


def test_answer_follows_the_prompt_that_a_model_is_given(opened):
    _, form = training.open_initial(opened)
    shown = Picture(np.zeros((1, 9, 9, 3), np.uint8), (9, 9))
    prompt = form.encode([Message("user", "What is it?", {PICTURES: [shown]})])
    outline = form.outline(lambda: b"", "x")
    ids, n_read = examples.see_example(form, "What is it?", "a cat", outline)
    assert ids[:n_read] == prompt and prompt.count(form.image_token) == 4
    coder = form.vocabulary.coder
    assert coder.decode(ids[n_read:-1]) == " a cat" and ids[-1] in form.vocabulary.stop_ids


def test_picture_follows_the_prompt_that_draws(opened):
    checkpoint, form = training.open_initial(opened)
    prompt = encode(checkpoint, form, "a cat")
    ids, n_read = examples.draw_example(form, "a cat")
    assert ids == [*prompt, *[form.image_token] * 4] and n_read == len(ids)


def test_text_is_cut_into_pieces_and_none_of_it_is_lost(opened):
    _, form = training.open_initial(opened)
    pieces = list(examples.text_examples(form, "some words to be read", 8))
    assert [len(piece.ids) for piece in pieces] == [8, 8, 7]  # with begin and end
    joined = [token for piece in pieces for token in piece.ids]
    coder = form.vocabulary.coder
    assert form.vocabulary.bos is not None
    assert coder.decode(joined[1:-1]) == "some words to be read"
    assert joined[0] == coder.control[form.vocabulary.bos]
    assert joined[-1] in form.vocabulary.stop_ids
    assert {piece.n_read for piece in pieces} == {0}


def test_example_without_room_is_dropped_and_counted(opened, tmp_path):
    checkpoint, form = training.open_initial(opened)
    lengths = [len(examples.draw_example(form, "noise " * (n % 3) + str(n)).ids) for n in range(9)]
    janus = dataclasses.replace(
        opened.janus, ratio=(0, 0, 1), sequence_length=sorted(lengths)[4] - 1
    )
    config = dataclasses.replace(opened, janus=janus)
    said = []
    data = training.read_data(config, checkpoint, form, said.append)
    room = sum(length <= sorted(lengths)[4] for length in lengths)
    assert (
        f"{9 - room} longer than janus.sequence_length={sorted(lengths)[4] - 1}, dropped" in said[0]
    )
    assert data.training is not None and 0 < room < 9


@pytest.mark.parametrize("kind", ["see", "text", "draw"])
def test_files_without_an_example_are_named(kind, opened, tmp_path):
    checkpoint, form = training.open_initial(opened)
    (tmp_path / "empty.jsonl").write_text("\n")
    janus = dataclasses.replace(opened.janus, **{kind: str(tmp_path / "empty.jsonl")})
    with pytest.raises(ValueError, match=rf"^janus\.{kind}=.*empty\.jsonl' holds no example"):
        training.read_data(dataclasses.replace(opened, janus=janus), checkpoint, form, print)


def test_question_that_spells_other_pictures_is_named(opened, tmp_path):
    """Of DeepSeek-VL2, whose pictures stand where a message spells `<image>`."""
    vl2.picture((22, 22)).save(tmp_path / "0.png")
    line = {"image": "0.png", "question": "<image> or <image>?", "answer": "b"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(line))
    janus = dataclasses.replace(
        opened.janus, see=str(tmp_path / "asked.jsonl"), ratio=(1, 0, 0), trains=("language",)
    )
    base = vl2.write(tmp_path / "vl2", vl2.CASES["heads"])
    config = dataclasses.replace(opened, init=str(base), janus=janus)
    checkpoint, form = training.open_initial(config)
    with pytest.raises(ValueError, match=r"asked.jsonl:1: the message spells <image> 2 times"):
        training.read_data(config, checkpoint, form, print)


def test_same_words_about_another_picture_are_another_example(opened):
    checkpoint, form = training.open_initial(opened)
    found = examples.read_examples(
        opened, form, lambda: training.load_eyes(checkpoint, dtype=np.float32).pencil.vq,
        training.Path(opened.janus.cache_dir), lambda text: None, lambda done, total: None,
    )  # fmt: skip
    for kind in ("see", "draw"):
        digests = found[kind].digests()
        assert len(set(digests.tolist())) == toy.COUNT
        assert not set(digests.tolist()) & set(found[kind].tokens.digests().tolist())

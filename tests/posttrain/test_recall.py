"""Recall counts right answers by length and depth; what cannot be asked is named."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from dsjax.generate.request import Output
from dsjax.posttrain import recall
from dsjax.posttrain.haystacks import Maker
from dsjax.posttrain.recall import Found, Search

MAKER = Maker("tokens", None, 400, 5)


class Reader:
    """Answers with the token that followed the question among the last `window` tokens, else 0."""

    def __init__(self, window):
        self.window, self.batches, self.waiting = window, [], []

    def add(self, request):
        self.waiting.append(request.prompt)
        return len(self.waiting) - 1

    def step(self):
        prompts, self.waiting = self.waiting, []
        self.batches.append(prompts)
        return {id: Output([self.answer(prompt)], "length") for id, prompt in enumerate(prompts)}

    def answer(self, prompt):
        *seen, key = prompt[-self.window :]
        return dict(itertools.pairwise(seen)).get(key, 0)


def asked(**more):
    return Search(checkpoint=Path("model"), **{"task": "tokens", "lengths": [64, 256], **more})


def test_reader_of_everything_recalls_everything():
    shown = []
    found = recall.search(
        Reader(1000), MAKER, asked(n=5, max_batch=3), lambda *at: shown.append(at)
    )
    assert found.right_LDN.shape == (2, 5, 5) and found.right_LDN.all()
    assert shown == [(done, 50) for done in range(1, 51)]


def test_reader_of_the_end_recalls_what_is_there():
    """100 tokens are all of 64, and the last two of five depths of 256."""
    found = recall.search(Reader(100), MAKER, asked(n=4))
    assert found.recall.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert found.of_length(1).value == pytest.approx(0.4)
    assert found.of_length(1).low < 0.4 < found.of_length(1).high < 0.7


def test_texts_run_before_the_questions_that_share_them():
    """At most `max_batch` texts at a time, so that the engine still knows them."""
    reader = Reader(1000)
    recall.search(reader, MAKER, asked(lengths=[64], n=5, max_batch=3))
    assert [len(batch) for batch in reader.batches] == [3, 12, 2, 8]
    texts = {prompt[:-1] for prompt in reader.batches[0]}
    assert len(texts) == 3 and {prompt[:-1] for prompt in reader.batches[1]} == texts


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": [300]}, "--lengths 300 is not between 1 and the model's limit of 256"),
        ({"lengths": [0]}, "--lengths 0 is not between 1"),
        ({"depths": 0}, "--depths 0 is not at least 1"),
        ({"n": 0}, "--n 0 is not at least 1"),
        ({"max_batch": 0}, "--max-batch 0 is not at least 1"),
        ({"seed": -1}, "--seed -1 is negative"),
        ({"text": ["a.txt"]}, "--text is what surrounds needles"),
    ],
)
def test_what_cannot_be_asked_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        recall.check(asked(**change), 256)


def test_heat_map_that_cannot_be_drawn_is_refused_before_the_search(tmp_path):
    with pytest.raises(ValueError, match=r"map\.txt: cannot draw a \.txt; use one of .*png"):
        recall.run(asked(png=tmp_path / "map.txt"))
    with pytest.raises(ValueError, match=r"there is no folder .*absent; make it"):
        recall.run(asked(png=tmp_path / "absent" / "map.png"))


def test_heat_map_is_a_picture(tmp_path):
    found = Found([64, 256], [0.0, 0.5, 1.0], np.ones((2, 3, 4), bool))
    for name in ("map.png", "map"):
        recall.draw(tmp_path / name, found, "tokens")
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

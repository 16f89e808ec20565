"""Facts are at their depths, can be found there, and occur nowhere else."""

from typing import get_args

import numpy as np
import pytest

from dsjax.posttrain.haystacks import Kind, Maker, lines_of
from dsjax.text.tokenizer import train_tokenizer
from dsjax.text.vocabulary import open_vocabulary

LINES = [f"Line {number} of a long text about nothing.\n" for number in range(300)]
SIZE = 600


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([*LINES, "The secret number of Ba is 12345.\n"], vocab_size=400).save(folder)
    return open_vocabulary(folder, SIZE)


def maker(kind, vocabulary, n_depths=5, **more):
    return Maker(kind, vocabulary, SIZE, n_depths, lines=LINES, **more)


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("length", [700, 1024])
def test_prompt_and_answer_fill_the_length(kind, length, vocabulary):
    haystack = maker(kind, vocabulary).haystack(length, 0)
    longest = max(len(haystack.prompt(question)) for question in haystack.questions)
    assert length - 60 < longest + haystack.new_tokens <= length


@pytest.mark.parametrize("kind", ["needle", "pairs"])
def test_answer_of_a_text_follows_its_name_at_its_depth(kind, vocabulary):
    haystack = maker(kind, vocabulary).haystack(2000, 0)
    text = vocabulary.coder.decode(haystack.ids)
    assert [question.depth for question in haystack.questions] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for question in haystack.questions:
        asked = vocabulary.coder.decode(question.ids).removesuffix(" is").removesuffix(":")
        name = asked.split()[-1]
        joint = f"{name}: " if kind == "pairs" else f"number of {name} is "
        before, found, after = text.partition(joint + question.answer)
        assert found and name not in before + after
        assert len(before) / len(text) == pytest.approx(question.depth, abs=0.06)


@pytest.mark.parametrize("length", [256, 2048])
def test_asked_pair_of_ids_is_at_its_depth_alone(length, vocabulary):
    """2,048 tokens have more pairs than 400 tokens of a vocabulary have keys: others recur."""
    haystack = maker("tokens", vocabulary).haystack(length, 0)
    bos, *pairs = haystack.ids
    assert bos == vocabulary.coder.control[vocabulary.bos]
    keys, values = np.reshape(pairs, (-1, 2)).T
    assert not set(pairs) & set(vocabulary.coder.control.values())
    assert not set(keys) & set(values)
    value_of = {}
    assert all(value_of.setdefault(k, v) == v for k, v in zip(keys, values, strict=True))
    for question in haystack.questions:
        (place,) = np.flatnonzero(keys == question.ids[0])
        assert values[place] == question.answer
        assert place / (len(keys) - 1) == pytest.approx(question.depth, abs=0.01)


def test_ids_need_no_tokenizer():
    haystack = Maker("tokens", None, 100, 3).haystack(50, 0)
    assert len(haystack.ids) == 48 and max(haystack.ids) < 100


@pytest.mark.parametrize("kind", get_args(Kind))
def test_haystacks_follow_from_seed_length_and_number(kind, vocabulary):
    def ids(length=700, number=0, seed=0):
        return maker(kind, vocabulary, seed=seed).haystack(length, number).ids

    assert ids() == ids()
    others = [ids(number=1), ids(seed=1), ids(length=701)]
    assert all(other != ids() for other in others)


@pytest.mark.parametrize(
    "said, right",
    [(" 12345.", True), ("12345", True), (" 123456", False), (" 1234", False), ("", False)],
)
def test_answer_is_a_whole_number_at_the_beginning(said, right, vocabulary):
    question = maker("needle", vocabulary).haystack(700, 0).questions[0]
    question = question._replace(answer="12345")
    assert question.is_right(vocabulary.coder.encode(said), vocabulary) is right


@pytest.mark.parametrize(
    "kind, length, n_depths, message",
    [
        ("needle", 300, 20, "--lengths 300 has no room for --depths 20 facts"),
        ("pairs", 60, 5, "--lengths 60 has no room for --depths 5 facts"),
        ("tokens", 20, 9, "--lengths 20 has no room for --depths 9 facts"),
        ("tokens", 4000, 400, "--depths 400 needs as many keys and one more"),
    ],
)
def test_facts_without_room_are_refused(kind, length, n_depths, message, vocabulary):
    with pytest.raises(ValueError, match=message):
        maker(kind, vocabulary, n_depths).haystack(length, 0)


def test_lines_are_cut_where_they_are_long():
    texts = iter(["a\n\n  b c\n", "x" * 450, "never read"])
    assert lines_of(texts, 300) == ["a\n", "  b c\n", *(f"{'x' * n}\n" for n in (200, 200, 50))]

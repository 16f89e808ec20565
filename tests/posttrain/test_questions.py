"""Questions become prompts by the checkpoint's format, and come in an order of their own."""

import pytest

from dsjax.config.reinforcement import RlConfig
from dsjax.posttrain.problems import Problem
from dsjax.posttrain.questions import Questions
from dsjax.text.chat import find_format
from dsjax.text.vocabulary import open_vocabulary
from tests.posttrain import toy
from tests.text import released

RL = RlConfig(max_new_tokens=8)


@pytest.fixture(scope="module", params=["R1", "V3", "base"])
def kind(request, tmp_path_factory):
    folder = released.write_checkpoint(
        tmp_path_factory.mktemp(request.param) / "hf", toy.CONTROL[request.param]
    )
    vocabulary = open_vocabulary(folder, toy.VOCAB_SIZE)
    return request.param, vocabulary, find_format(folder, vocabulary)


def problem(prompt="2+2", **fields):
    return Problem(prompt, fields, "p.jsonl:3")


def questions(kind, *problems, rl=RL, context=64):
    _, vocabulary, chat = kind
    return Questions(problems, vocabulary, chat, rl, context=context)


def ids(text):
    """The toy tokenizer's ids of ASCII without spaces and control characters."""
    return [ord(character) - ord("!") + 3 for character in text]


def test_prompt_is_that_of_the_format(kind):
    found = questions(kind, problem(answer="4"))
    wanted = {
        "R1": [0, toy.USER, *ids("2+2"), toy.ASSISTANT, toy.THINK, released.LINE_BREAK],
        "V3": [0, toy.USER, *ids("2+2"), toy.ASSISTANT],
        "base": [0, *ids("2+2")],
    }[kind[0]]
    assert list(found.prompts[0]) == wanted and found.longest == len(wanted)
    assert found.facts == [{"answer": "4", "prompt": "2+2", "opened": kind[0] == "R1"}]


def test_template_goes_around_the_question(kind):
    rl = RlConfig(max_new_tokens=8, template="Q:{prompt}\nA:<think>")
    found = questions(kind, problem(), rl=rl)
    text = kind[1].coder.decode(found.prompts[0], skip_special=True)
    assert "Q:2+2\nA:<think>" in text
    assert found.facts[0]["opened"] == (kind[0] != "V3")


def test_messages_and_a_system_prompt_need_a_format(kind):
    given = problem([{"role": "user", "content": "2+2"}])
    rl = RlConfig(max_new_tokens=8, system="be-brief")
    if kind[0] == "base":
        with pytest.raises(ValueError, match=r"p\.jsonl:3: the tokenizer has no chat format"):
            questions(kind, given)
        with pytest.raises(ValueError, match=r"rl\.system"):
            questions(kind, problem(), rl=rl)
        return
    assert questions(kind, given).prompts == questions(kind, problem()).prompts
    assert list(questions(kind, given, rl=rl).prompts[0][1:9]) == ids("be-brief")


def test_raw_question_has_no_turns_whatever_the_tokenizer(kind):
    rl = RlConfig(max_new_tokens=8, raw=True)
    assert list(questions(kind, problem(), rl=rl).prompts[0]) == [0, *ids("2+2")]
    with pytest.raises(ValueError, match=r"rl\.raw=on|no chat format"):
        questions(kind, problem([{"role": "user", "content": "2+2"}]), rl=rl)


def test_question_without_room_for_an_answer_is_refused(kind):
    with pytest.raises(ValueError, match=r"p\.jsonl:3: the prompt of 10\d tokens and rl\.max_new"):
        questions(kind, problem(), problem("7" * 100))


def test_epochs_are_permutations_and_the_stream_has_no_seams(kind):
    found = questions(kind, *(problem(str(number)) for number in range(7)))
    whole = found.drawn(0, 21, seed=3)
    epochs = [whole[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for first, count in ((0, 3), (3, 9), (6, 1), (12, 9)):
        assert found.drawn(first, count, seed=3) == whole[first : first + count]
    assert found.drawn(0, 21, seed=4) != whole


def test_fingerprint_is_that_of_prompts_and_facts(kind):
    one = questions(kind, problem(answer="4")).fingerprint
    assert one == questions(kind, problem(answer="4")).fingerprint
    assert one != questions(kind, problem(answer="5")).fingerprint
    assert one != questions(kind, problem("2+3", answer="4")).fingerprint

"""Problems as ids, and back into training data as the same ids."""

import pytest

from dsjax.posttrain.initial import open_initial
from dsjax.posttrain.problems import Problem
from dsjax.posttrain.prompts import Prompting
from tests.posttrain import toy

PROBLEM = Problem("What is it?", {}, "f:1")
TURNS = Problem(
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
     {"role": "user", "content": "c"}], {}, "f:1",
)  # fmt: skip


@pytest.fixture(scope="module", params=["V3", "R1", "V3.1", "base"])
def kind(request, tmp_path_factory):
    folder = toy.write_hf(tmp_path_factory.mktemp("prompts") / "c", "Qwen2", request.param)
    return request.param, open_initial(folder)


def test_prompt_holds_system_and_template(kind):
    name, initial = kind
    text = initial.vocabulary.coder.decode
    plain = Prompting(initial.vocabulary, initial.chat, template="Q: {prompt} A:")
    assert "Q: What is it? A:" in text(plain.encode(PROBLEM))
    asked = Prompting(initial.vocabulary, initial.chat, system="Be brief.")
    if name == "base":
        with pytest.raises(ValueError, match=r"given messages or --system; .* with --template"):
            asked.encode(PROBLEM)
        with pytest.raises(ValueError, match="given messages or --system"):
            plain.encode(TURNS)
    else:
        assert text(asked.encode(PROBLEM)).startswith("Be brief.")
        assert {toy.USER, toy.ASSISTANT} <= set(asked.encode(TURNS)) or name == "V3.1"


def test_thought_is_open_where_the_format_or_the_text_opens_it(kind):
    name, initial = kind
    prompting = Prompting(initial.vocabulary, initial.chat)
    assert prompting.opens_thought(prompting.encode(PROBLEM)) == (name == "R1")
    if name == "base":
        opening = Prompting(initial.vocabulary, None, template="{prompt}\n<think>\n")
        assert opening.opens_thought(opening.encode(PROBLEM))


def test_raw_prompt_has_no_turns_whatever_the_tokenizer(kind):
    _, initial = kind
    prompting = Prompting(initial.vocabulary, initial.chat, raw=True)
    assert prompting.encode(PROBLEM) == initial.vocabulary.plain_prompt("What is it?")
    assert prompting.shown(PROBLEM) == "What is it?"
    with pytest.raises(ValueError, match="--raw gives plain text, so the model cannot be given"):
        prompting.encode(TURNS)

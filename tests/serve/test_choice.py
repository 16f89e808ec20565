"""Tokens of a choice as text, thought, calls and reports."""

import numpy as np
import pytest

from dsjax.generate.record import Record
from dsjax.generate.request import Output
from dsjax.serve.choice import CUT, Choice, finite_logprob
from dsjax.text import tool_calls
from tests.serve.formats import TOOL_TOKENS


@pytest.fixture
def coder(vocabulary):
    return vocabulary.coder


@pytest.fixture
def make(vocabulary):
    def make(prompt=(0,), **options):
        return Choice(
            vocabulary.coder, prompt=prompt, stop_ids=vocabulary.stop_ids,
            think_ids=vocabulary.think_ids, **options,
        )  # fmt: skip

    return make


def push(choice, ids, finish=None):
    """All of a reply, token by token."""
    deltas = [
        choice.push(Output([token], finish if number == len(ids) - 1 else None))
        for number, token in enumerate(ids)
    ]
    content = "".join(delta.content for delta in deltas)
    thought = "".join(delta.thought for delta in deltas)
    return content, thought, [piece for delta in deltas for piece in delta.calls]


def test_stop_id_ends_a_reply_and_counts(make, coder, vocabulary):
    choice, (stop,) = make(), vocabulary.stop_ids
    delta = choice.push(Output([*coder.encode("Some text"), stop, 9, 9], "stop"))
    assert delta.content == "Some text" and delta.finish == choice.finish == "stop"
    assert choice.n_tokens == len(coder.encode("Some text")) + 1


def test_stop_string_ends_a_reply_before_its_limit(make, coder):
    choice = make(stops=["xt"])
    ids = coder.encode("Some te") + coder.encode("xt and more")
    assert push(choice, ids)[0] == "Some te" and choice.finish == "stop"
    assert choice.n_tokens < len(ids)


def test_limit_brings_what_was_held_back(make, coder):
    choice = make(stops=["end of it"])
    assert push(choice, coder.encode("an end of"), "length")[0] == "an end of"
    assert choice.finish == "length"


def test_thought_is_apart_and_without_line_breaks_around_it(make, coder, vocabulary):
    think, end_think = vocabulary.think_ids
    choice = make(prompt=(0, think))
    ids = [*coder.encode("\nSome\nthought\n"), end_think, *coder.encode("\n\nthe text")]
    content, thought, _ = push(choice, ids, "length")
    assert (content, thought) == ("the text", "Some\nthought\n")
    assert choice.n_thought == len(coder.encode("\nSome\nthought\n")) + 1
    assert push(make(), coder.encode("\n\ntext"), "length")[0] == "\n\ntext"


@pytest.mark.parametrize("fenced", [False, True])
def test_calls_are_read_and_end_the_reply(make, coder, fenced):
    calls = [{"function": {"name": "get", "arguments": '{"a": 1}'}}] * 2
    parts = ["Some text", *tool_calls.write_calls(calls, fenced=fenced)]
    ids = [
        token
        for part in parts
        for token in ([coder.control[part]] if part in TOOL_TOKENS else coder.encode(part))
    ]
    choice = make(fenced=fenced)
    content, _, pieces = push(choice, [*ids, 1, 1], "length")
    assert content == "Some text" and choice.finish == "tool_calls"
    assert [piece.name for piece in pieces if piece.name] == ["get", "get"]
    for index in (0, 1):
        assert "".join(p.arguments for p in pieces if p.number == index) == '{"a": 1}'
    # Without tools the same tokens are text.
    assert "get" in push(make(), ids, "length")[0]


def test_begun_call_goes_on(make, coder):
    control = coder.control
    begun = [control[tool_calls.CALLS], control[tool_calls.CALL]]
    ids = [*coder.encode("get"), control[tool_calls.SEPARATOR], *coder.encode("{}"),
           control[tool_calls.END_CALL], control[tool_calls.END_CALLS]]  # fmt: skip
    choice = make(fenced=False, within_calls=begun)
    content, _, pieces = push(choice, ids)
    assert content == "" and pieces[0].name == "get" and choice.finish == "tool_calls"
    assert choice.n_tokens == len(ids)


def test_reports_belong_to_the_shown_tokens(make, coder, vocabulary):
    (stop,) = vocabulary.stop_ids
    choice = make(top=2)
    ids = [*coder.encode("So"), stop]
    report = Record(
        np.full(len(ids), -1.5, np.float32),
        top_ids=np.tile(np.int32([[7, 8, 9]]), (len(ids), 1)),
        top_logprobs=np.tile(np.float32([[-1, -np.inf, -3]]), (len(ids), 1)),
    )
    reports = choice.push(Output(ids, "stop", report)).reports
    assert [each.token for each in reports] == ids[:-1]
    assert reports[0].logprob == -1.5 and not reports[0].thought
    assert reports[0].top == [(7, -1.0), (8, -9999.0)]


def test_cut_reply_keeps_its_text(make, coder):
    choice = make(stops=["more text"])
    choice.push(Output(coder.encode("and more te")))
    delta = choice.cut()
    assert delta.content.endswith("more te") and delta.finish == choice.finish == CUT
    assert choice.push(Output([5], "length")).content == ""


@pytest.mark.parametrize("impossible", [-np.inf, np.nan])
def test_log_probability_is_a_number_that_json_can_hold(impossible):
    assert finite_logprob(np.float32(impossible)) == -9999.0
    assert finite_logprob(np.float32(-0.5)) == -0.5

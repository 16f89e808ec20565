"""Tools of a request: what is refused, and what binds a reply that must call one."""

import json

import numpy as np
import pytest

from dsjax.generate.request import Output
from dsjax.serve.choice import Choice
from dsjax.serve.errors import ApiError
from dsjax.serve.fields import Fields
from dsjax.serve.grammar import Grammars
from dsjax.serve.tools import call_grammar, opening, read_tools
from tests.serve.formats import VOCAB_SIZE

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name="get_weather", parameters=CITY, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def read(**values):
    fields = Fields(values)
    tools = read_tools(fields)
    fields.finish()
    return tools


def test_choice_says_what_a_reply_must_call():
    both = [tool(), tool("other", description="Another.", strict=True)]
    assert read() == ((), ()) and read(tools=both, tool_choice="none") == ((), ())
    assert read(tools=both).required == () == read(tools=both, tool_choice="auto").required
    assert read(tools=both, tool_choice="required").required == ("get_weather", "other")
    named = {"type": "function", "function": {"name": "other"}}
    assert read(tools=both, tool_choice=named).required == ("other",)
    assert read(tools=both).given[1]["function"]["description"] == "Another."


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": [tool()] * 129}, "tools has 129 items; at most 128"),
        ({"tools": [tool(), tool()]}, "tools must have different names"),
        ({"tools": [tool("a b")]}, r"tools\[0\].function.name must be 1 to 64"),
        ({"tools": [tool(parameters=[])]}, r"tools\[0\].function.parameters must be an object"),
        ({"tools": [{"type": "search"}]}, r"tools\[0\].type must be one of function"),
        ({"tools": [tool(extra=1)]}, r"tools\[0\].function.extra is not a field"),
        ({"tools": [tool()], "tool_choice": "some"}, "tool_choice must be none, auto, required"),
        ({"tool_choice": "required"}, "tool_choice is required, and there are no tools"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name must be one of get_weather, not 'x'",
        ),
    ],
)
def test_malformed_tools_are_refused(values, message):
    with pytest.raises(ApiError, match=message):
        read(**values)


@pytest.mark.parametrize("fenced", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_blind_draws_make_a_valid_call(vocabulary, fenced, seed):
    tools = read(tools=[tool(), tool("other")], tool_choice="required")
    coder = vocabulary.coder
    begun = opening(coder, fenced=fenced)
    choice = Choice(
        coder, prompt=(0,), stop_ids=vocabulary.stop_ids, fenced=fenced, within_calls=begun
    )
    grammars = Grammars(coder, VOCAB_SIZE, vocabulary.stop_ids)
    matcher = grammars.lark(call_grammar(tools, coder, fenced=fenced), "tools")
    rng, pieces = np.random.default_rng(seed), []
    while choice.finish is None:
        token = int(rng.choice(np.flatnonzero(matcher.allowed())))
        matcher.push(token)
        pieces += choice.push(Output([token])).calls
    assert choice.finish == "tool_calls" and pieces[0].name in ("get_weather", "other")
    text = "".join(piece.arguments for piece in pieces)
    assert not set(text) & {"\r", "\t"}  # the layout is bounded, as that of JSON replies is
    arguments = json.loads(text)
    assert arguments.keys() == {"city"} and arguments["city"] in ("Rome", "Oslo")

"""What binds a reply to a call in V3.2's markup."""

import json

import numpy as np
import pytest

from dsjax.generate.request import Output
from dsjax.serve.choice import Choice
from dsjax.serve.errors import ApiError
from dsjax.serve.grammar import Grammars
from dsjax.serve.marked_calls import call_grammar, opening
from dsjax.text import dsml
from dsjax.text.vocabulary import open_vocabulary
from tests.serve.formats import VOCAB_SIZE

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"], "description": "Which."},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "note": {"type": "string", "maxLength": 3},
        "where": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "where"],
    "$defs": {"place": {"enum": [[1, 2], None]}},
}
FUNCTIONS = [
    {"name": "get", "parameters": SCHEMA},
    {"name": "now", "parameters": {"type": "object", "properties": {}}},
]


def begin(vocabulary, functions):
    """The grammar of a call, and a reader of the reply."""
    coder = vocabulary.coder
    grammars = Grammars(coder, VOCAB_SIZE, vocabulary.stop_ids)
    choice = Choice(
        coder, prompt=(0,), stop_ids=vocabulary.stop_ids, marked=True, within_calls=opening(coder)
    )
    return grammars.lark(call_grammar(functions), "tools"), choice


@pytest.fixture(params=["V3.2", "V3.1"], ids=["token", "text"])
def vocabulary(folders, request):
    """With the token of the markup, and one to which it is text."""
    return open_vocabulary(folders[request.param], VOCAB_SIZE)


def test_blind_draws_make_a_valid_call(vocabulary):
    names = set()
    for seed in range(6):
        matcher, choice = begin(vocabulary, FUNCTIONS[: 1 + seed % 2])
        rng, pieces = np.random.default_rng(seed), []
        while choice.finish is None:
            token = int(rng.choice(np.flatnonzero(matcher.allowed())))
            matcher.push(token)
            pieces += choice.push(Output([token])).calls
        assert choice.finish == "tool_calls"
        arguments = json.loads("".join(piece.arguments for piece in pieces))
        names.add(pieces[0].name)
        if pieces[0].name == "now":
            assert arguments == {}
            continue
        assert {"city", "where"} <= arguments.keys() <= SCHEMA["properties"].keys()
        assert arguments["city"] in ("Rome", "Oslo") and arguments["where"] in ([1, 2], None)
        assert 1 <= arguments.get("days", 1) <= 9 and len(arguments.get("note", "")) <= 3
    assert "get" in names


def follow(vocabulary, functions, call):
    """How many tokens of a written call the grammar admits, and how many there are."""
    written = "".join(dsml.write_calls([call]))[len(dsml.BEGIN_CALL) :]
    ids = dsml.encode(written, vocabulary.coder)
    matcher, _ = begin(vocabulary, functions)
    for number, token in enumerate(ids):
        if not matcher.allowed()[token]:
            return number, len(ids)
        matcher.push(token)
    return len(ids), len(ids)


def test_what_the_model_would_write_is_admitted(vocabulary):
    text = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
    functions = [{"name": "f", "parameters": text}]
    for arguments in ({"a": 'x < "y"\n</b>', "b": 3}, {"a": ""}, {"b": 1}, {}):
        call = {"function": {"name": "f", "arguments": json.dumps(arguments)}}
        admitted, of = follow(vocabulary, functions, call)
        assert admitted == of
    call["function"]["name"] = "g"
    assert follow(vocabulary, functions, call)[0] == 0


@pytest.mark.parametrize("parameters", [{"type": "array"}, {"properties": []}])
def test_schema_without_properties_is_refused(parameters):
    with pytest.raises(ApiError, match="a call of f: its parameters must be an object"):
        call_grammar([{"name": "f", "parameters": parameters}])


@pytest.mark.parametrize("needed", [5, None, "city", [5]])
def test_names_that_are_no_list_are_refused(needed):
    parameters = {"properties": {"city": {"type": "string"}}, "required": needed}
    with pytest.raises(ApiError, match="`required` of its parameters must be a list") as caught:
        call_grammar([{"name": "f", "parameters": parameters}])
    assert caught.value.status == 422


def test_names_of_arguments_that_the_markup_cannot_spell_are_refused():
    parameters = {"properties": {'a"b': {"type": "string"}}}
    with pytest.raises(ApiError, match="has no way to spell a quote in the name of an argument"):
        call_grammar([{"name": "f", "parameters": parameters}])

"""Replies that follow a grammar, whatever the model would rather say."""

import json
import time

import numpy as np
import pytest

from dsjax.serve.errors import ApiError
from dsjax.serve.grammar import Grammars
from tests.serve.formats import VOCAB_SIZE

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(vocabulary):
    return Grammars(vocabulary.coder, VOCAB_SIZE, vocabulary.stop_ids)


def drawn(matcher, vocabulary, seed, most=400):
    """A reply that draws blindly from what is allowed."""
    rng, ids = np.random.default_rng(seed), []
    while len(ids) < most:
        allowed = np.flatnonzero(matcher.allowed())
        token = int(rng.choice(allowed))
        if token in vocabulary.stop_ids:
            return vocabulary.coder.decode(ids)
        matcher.push(token)
        ids.append(token)
    return None


@pytest.mark.parametrize("seed", range(3))
def test_blind_draws_satisfy_a_schema(grammars, vocabulary, seed):
    value = json.loads(drawn(grammars.schema(SCHEMA, "schema"), vocabulary, seed))
    assert value.keys() == {"name", "kind", "ages"} and value["kind"] in ("cat", "dog")
    assert len(value["name"]) <= 5 and 1 <= len(value["ages"]) <= 2
    assert all(type(age) is int for age in value["ages"])


def test_regular_expression_and_grammar_bind_too(grammars, vocabulary):
    assert drawn(grammars.regex("(yes|no)!", "regex"), vocabulary, 0) in ("yes!", "no!")
    assert drawn(grammars.lark('start: "a" | "b"', "grammar"), vocabulary, 0) in ("a", "b")
    allowed = grammars.json_object("response_format").allowed()
    first = {vocabulary.coder.decode([token])[:1] for token in np.flatnonzero(allowed)}
    assert "{" in first and not first - {"{", " ", "\n", "\t", "\r"}


def test_reply_ends_where_its_text_is_complete(grammars, vocabulary):
    matcher = grammars.regex("ab", "regex")
    for token in vocabulary.coder.encode("ab"):
        assert not set(np.flatnonzero(matcher.allowed())) & vocabulary.stop_ids
        matcher.push(token)
    assert set(np.flatnonzero(matcher.allowed())) == vocabulary.stop_ids


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: g.schema([1], "x"), "x must be an object that holds a JSON schema"),
        (lambda g: g.schema({"type": "nonsense"}, "x"), "x cannot be followed"),
        (lambda g: g.schema({"enum": ["a" * 140_000]}, "x"), "characters; at most 131072 may be"),
        (lambda g: g.regex("(((", "x"), "x cannot be followed"),
        (lambda g: g.lark("start: missing", "x"), "x cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused(grammars, make, message):
    with pytest.raises(ApiError, match=message) as caught:
        make(grammars)
    assert caught.value.status == 422 and caught.value.param == "x"


@pytest.mark.parametrize("pattern", ["(a{1,1000}){1,1000}b", "(a*)*(a*)*c", "(.*a){30}"])
def test_bombs_take_little_time(grammars, vocabulary, pattern):
    start = time.monotonic()
    matcher = grammars.regex(pattern, "x")
    for token in vocabulary.coder.encode("aaaa"):
        matcher.allowed()
        matcher.push(token)
    assert time.monotonic() - start < 10

"""Fields of a body: types, ranges, and what nobody takes."""

import re

import pytest

from dsjax.serve.errors import ApiError
from dsjax.serve.fields import Fields


@pytest.mark.parametrize(
    ("take", "values", "message"),
    [
        (lambda f: f.text("a"), {}, "a is missing"),
        (lambda f: f.text("a"), {"a": None}, "a is missing"),
        (lambda f: f.text("a"), {"a": 3}, "a must be a text, not 3"),
        (lambda f: f.text("a", most=2), {"a": "abc"}, "a has 3 characters; at most 2 may be"),
        (lambda f: f.choice("a", ["x", "y"]), {"a": "z"}, "a must be one of x, y, not 'z'"),
        (lambda f: f.choice("a", ["x"]), {"a": ["x"]}, "a must be one of x, not a list"),
        (lambda f: f.boolean("a"), {"a": 1}, "a must be true or false, not 1"),
        (lambda f: f.integer("a", 1, 0, 5), {"a": 6}, "a must be a whole number between 0 and 5"),
        (lambda f: f.integer("a", 1, 2, None), {"a": 1}, "a must be a whole number of at least 2"),
        (lambda f: f.integer("a", 1, 0, 5), {"a": True}, "not true"),
        (lambda f: f.integer("a", 1, 0, 5), {"a": 1.5}, "not 1.5"),
        (lambda f: f.number("a", 1, 0, 2), {"a": 2.5}, "a must be a number between 0 and 2"),
        (lambda f: f.number("a", 1, 0, 2), {"a": "1"}, "not '1'"),
        (lambda f: f.number("a", 1, 0, 2), {"a": 10**400}, "a must be a number between 0 and 2"),
        (lambda f: f.number("a", 1, 0, 2), {"a": float("nan")}, "not nan"),
        (lambda f: f.number("a", 1, 0, 2), {"a": {}}, "not an object"),
        (lambda f: f.items("a", most=1), {"a": [1, 2]}, "a has 2 items; at most 1 may be"),
        (lambda f: f.items("a", most=1), {"a": {}}, "a must be a list, not an object"),
        (lambda f: f.finish(), {"zeta": 1}, "zeta is not a field that this server knows"),
    ],
)
def test_field_is_refused_by_name(take, values, message):
    with pytest.raises(ApiError, match=re.escape(message)) as caught:
        take(Fields(values))
    assert caught.value.status == 422 and caught.value.param in ("a", "zeta")


@pytest.mark.parametrize(
    ("name", "spelled"),
    [("", "''"), (" ", "' '"), ("a.b", "'a.b'"), ("a\nb", r"'a\nb'"), ("0", "'0'")],
)
def test_keys_that_are_no_names_are_spelled(name, spelled):
    """In a path they would not be seen, or look like one."""
    for place, where in (("", "body"), ("messages[0]", "messages[0]")):
        with pytest.raises(ApiError) as caught:
            Fields({name: 1}, place).finish()
        assert caught.value.message.startswith(f"{where} has the key {spelled}, which")
        assert caught.value.param == where and caught.value.code == "unknown"


def test_fields_are_taken_with_their_defaults():
    fields = Fields({"a": 2.0, "b": None, "c": "x", "d": 1, "e": False, "m": 0}, "messages[0]")
    assert fields.integer("a", 1, 0, 5) == 2 and type(fields.integer("a", 1, 0, 5)) is int
    assert fields.integer("b", None, 0, 5) is None and fields.text("b", "none") == "none"
    assert fields.text("c") == "x" and fields.number("d", 0, 0, 2) == 1.0
    assert fields.boolean("e", True) is False and fields.boolean("f", True) is True
    assert not fields.has("b") and fields.has("a") and fields.path("a") == "messages[0].a"
    fields.finish(harmless={"m"})


def test_body_is_an_object():
    with pytest.raises(ApiError, match="body must be an object, not a list"):
        Fields([])
    with pytest.raises(ApiError, match=r"tools\[1\] must be an object, not null"):
        Fields(None, "tools[1]")


def test_long_names_and_values_are_shown_short():
    with pytest.raises(ApiError) as caught:
        Fields({"a" * 5000: 1}).finish()
    assert len(str(caught.value)) < 200
    with pytest.raises(ApiError) as caught:
        Fields({"a": "b" * 5000}).number("a", 1, 0, 1)
    assert len(str(caught.value)) < 200

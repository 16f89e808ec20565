"""Plain data between an answer's process and its tests."""

import json
import math

import pytest

from dsjax.posttrain.confined import decode, encode


@pytest.mark.parametrize(
    "value",
    [
        None, True, 1, -(10**40), 0.5, "\ud800x", [1, [2]], (1, (2,)), {1, 2}, frozenset("a"),
        {}, {"dict": [1]}, {(1, 2): {"a": {3}}}, 1 + 2j, b"\x00\xff", math.inf, -math.inf, [], (),
    ],
    ids=repr,
)  # fmt: skip
def test_plain_data_survives_json(value):
    there = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert there == value and type(there) is type(value)


def test_nan_survives_and_subclasses_become_plain():
    assert math.isnan(decode(encode(math.nan)))
    kind = type("E", (int,), {"__eq__": lambda self, other: True, "__hash__": None})
    assert type(encode(kind(3))) is int and encode(kind(3)) != 4


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="object is no plain data"):
        encode([object()])
    for forged in ({"x": 1}, {}, {"tuple": 1}, {"a": 1, "b": 2}, {"bytes": "zz"}):
        with pytest.raises((ValueError, TypeError, KeyError)):
            decode(forged)

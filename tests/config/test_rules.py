"""The checks that every group is made of name the key, its value and the rule."""

import types

import pytest

from dsjax.config import rules

VALUES = types.SimpleNamespace(zero=0, negative=-1, half=0.5, one=1, large=1.5, many=10_001)


def test_require_raises_its_message_only_when_the_condition_fails():
    rules.require(True, "unused")
    with pytest.raises(ValueError, match=r"^a=1 must be 2$"):
        rules.require(False, "a=1 must be 2")


@pytest.mark.parametrize(
    ("rule", "accepted", "refused", "message"),
    [
        (rules.require_positive, "half", "zero", r"^group\.zero=0 must be greater than 0$"),
        (rules.require_not_negative, "zero", "negative", r"negative=-1 must not be negative"),
        (rules.require_few, "one", "many", r"^group\.many=10001 exceeds 10,000, more layers"),
        (rules.require_fraction, "one", "large", r"large=1\.5 must lie between 0 and 1"),
        (rules.require_fraction, "zero", "negative", r"negative=-1 must lie between 0 and 1"),
    ],
)
def test_rules_check_every_name(rule, accepted, refused, message):
    rule("group", VALUES, accepted, "half")
    with pytest.raises(ValueError, match=message):
        rule("group", VALUES, accepted, refused)


def test_a_key_may_equal_the_one_that_limits_it():
    rules.require_at_most("group", VALUES, "one", "one")
    with pytest.raises(ValueError, match=r"^group\.large=1\.5 exceeds group\.one=1$"):
        rules.require_at_most("group", VALUES, "large", "one")

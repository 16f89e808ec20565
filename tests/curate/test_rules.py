"""Thresholds and the first that fails."""

import numpy as np
import pytest

from dsjax.curate import code, rules, signals
from dsjax.curate.rules import Rule


def test_rules_name_signals_that_are_measured():
    for (kind, _), chosen in rules.STANDARD.items():
        known = {"garbled", *(code.NAMES if kind == "code" else signals.NAMES)}
        names = [rule.signal for rule in chosen]
        assert set(names) <= known and len(set(names)) == len(names)


def test_first_failure_wins_and_bounds_are_kept():
    columns = {
        "a": np.array([1.0, 5.0, 1.0, 6.0, np.nan]),
        "b": np.array([0.0, 1.0, 2.0, 9.0, 1.0]),
    }
    found = rules.first_failures(columns, [Rule("a", high=5), Rule("b", 0, 1)])
    assert found.tolist() == [-1, -1, 1, 0, -1]


def test_changes_replace_add_and_remove():
    found = rules.table(
        ["web.en.words=20..", "code.any.parses=off", "math.en.sentences=2..", "web.en.words=30.."]
    )
    names = [rule.signal for rule in found["web", "en"]]
    assert names == [rule.signal for rule in rules.STANDARD["web", "en"]]
    assert found["web", "en"][names.index("words")].low == 30
    assert "parses" not in [rule.signal for rule in found["code", "any"]]
    assert found["math", "en"][-1] == Rule("sentences", low=2)
    assert found["web", "zh"] == rules.STANDARD["web", "zh"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("code.en.words=1..", "none of the sets web.en"),
        ("web.en.parses=1..", "names no signal of web; it has garbled, words"),
    ],
)
def test_change_of_what_there_is_not(change, message):
    with pytest.raises(ValueError, match=message):
        rules.table([change])

"""Names of rewards."""

import pytest

from dsjax.posttrain.rewards.registry import find


def test_names_stand_for_modules_and_arguments(tmp_path, monkeypatch):
    assert find("math").module == "dsjax.posttrain.rewards.math"
    assert find("judge:http://h:1/v1").arguments == ("http://h:1/v1",)
    assert find("prover:lean --run x").arguments == ("lean --run x",)
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert find("mine.py:worth").arguments == (str(tmp_path / "mine.py"), "worth")


def test_rule_of_a_problem_is_the_one_it_names_or_implies():
    rule = find("rule")
    assert rule.of({"rule": "format", "answer": "1"}).name == "format"
    assert rule.of({"data_source": "math"}).name == "math"
    assert rule.of({"data_source": "numina", "answer": "1"}).name == "math"
    assert rule.of({"numbers": [1], "target": 1, "answer": "1"}).name == "countdown"
    assert rule.of({"tests": [], "entry": "f"}).name == "code"
    assert find("math").of({"rule": "countdown"}).name == "math"
    for problem in ({}, {"rule": "x", "answer": "1"}, {"rule": "rule"}):
        with pytest.raises(ValueError, match=r"the problem's field 'rule' is .*; name one of math"):
            rule.of(problem)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "there is no reward 'maths'; did you mean math\\? there are math, countdown"),
        ("", "there is no reward ''; there are"),
        ("judge", "did you mean judge"),
        ("judge:", "says nothing after the colon; judge:http"),
        ("gone.py:f", r"there is no file gone\.py"),
        (__file__ + ":not a name", "'not a name' is no name of a function"),
    ],
)
def test_unknown_name_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find(name)

"""A reward of the user's own."""

import pytest

from dsjax.posttrain.problems import Problem
from dsjax.posttrain.rewards import Grader, score


def test_function_sees_completion_and_problem(tmp_path):
    (tmp_path / "beside.py").write_text("FACTOR = 2")
    path = tmp_path / "mine.py"
    path.write_text(
        "from beside import FACTOR\n"
        "def worth(completion, problem): return FACTOR * len(completion) + problem['more']\n"
    )
    assert score(f"{path}:worth", "abc", {"more": 0.5}) == 6.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(): ...", "AttributeError: module 'user_reward' has no attribute 'worth'"),
        ("worth = 5", "TypeError: worth is int, not a function"),
        ("def worth(", "SyntaxError"),
        ("import nothing_here", "ModuleNotFoundError"),
    ],
)
def test_function_that_cannot_be_called_is_refused_before_the_run(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with Grader([f"{path}:worth"], workers=1) as grader:
        with pytest.raises(ValueError, match=f"f:1: reward .*mine.py cannot be used: {message}"):
            grader.check([Problem("q", {}, "f:1")])

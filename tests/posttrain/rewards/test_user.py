"""A reward of the user's own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsjax.posttrain.problems import Problem, read_problems
from dsjax.posttrain.rewards import Grader, score

ROOT = Path(__file__).parents[3]


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


def blocks(page):
    """Returns the Python blocks of a page by the name in their first line."""
    found = re.findall(r"```python\n# (\w+\.py).*?\n(.*?)```", page.read_text(), re.DOTALL)
    return dict(found)


def test_example_of_the_docs_runs(tmp_path):
    files = blocks(ROOT / "docs/rewards.md")
    for name in ("make.py", "backwards.py"):
        (tmp_path / name).write_text(files[name])
    subprocess.run([sys.executable, "make.py"], cwd=tmp_path, check=True)
    problems = read_problems(str(tmp_path / "problems.jsonl"))
    name = f"{tmp_path}/backwards.py:worth"
    with Grader([name], workers=1) as grader:
        grader.check(problems)
        facts = problems[0].facts(opened=False)
        word = facts["word"]
        texts = [f"<answer>{word[::-1]}</answer>", f"<answer>{word}</answer>", word[::-1]]
        right, half, nothing = [each[name] for each in grader.grade(texts, [facts] * 3)]
        assert right == 1.0 and 0 < half < 0.5 and nothing == 0.0
        assert grader.grade(["x"], [{}]) == [{name: None}]


def test_steps_of_the_docs_are_judged_line_by_line(tmp_path):
    (tmp_path / "lines.py").write_text(blocks(ROOT / "docs/rewards.md")["lines.py"])
    name = f"{tmp_path}/lines.py:worth"
    text = "9-4=5\n5+17=23\nso 22\n</think><answer>9-4+17</answer>"
    with Grader([name], workers=1) as grader:
        (verdict,), (nothing,) = (each.values() for each in grader.judge([text, ""], [{}] * 2))
    assert verdict.steps == ((6, 1.0), (14, 0.0), (20, 0.0)) and nothing.value is None


def test_prover_of_the_docs_runs(tmp_path):
    """With a stand-in for Lean's build tool that takes what says so."""
    (tmp_path / "lean.py").write_text(blocks(ROOT / "docs/rewards.md")["lean.py"])
    lake = tmp_path / "lake"
    lake.write_text("#!/bin/sh\ngrep -q 'rfl\\|sorry' && grep -q Mathlib project.txt\n")
    lake.chmod(0o755)
    (tmp_path / "project.txt").write_text("Mathlib")
    command = f"env PATH={tmp_path}:/usr/bin:/bin {sys.executable} {tmp_path}/lean.py {tmp_path}"
    name = f"prover:{command}"
    texts = [
        f"```lean4\ntheorem a : 1 = 1 := {proof}\n```" for proof in ("rfl", "sorry", "nothing")
    ]
    with Grader([name], workers=1) as grader:
        found = grader.grade(texts, [{"header": "import Mathlib"}] * 3)
    assert [each[name] for each in found] == [1.0, 0.0, 0.0]

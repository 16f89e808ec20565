"""tools/sample.py as a user runs it: what is refused before anything is read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.posttrain import toy

ROOT = Path(__file__).parents[1]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "tools/sample.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_bad_input_is_told_in_one_message(tmp_path):
    prompts = toy.write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}])
    done = run("gone", "--prompts", prompts, "--out", tmp_path / "out.jsonl")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "p.jsonl:1: the problem's field 'rule' is None; name one of math" in done.stderr
    assert list(tmp_path.iterdir()) == [prompts]


@pytest.mark.parametrize(
    "arguments",
    [["c"], ["c", "--prompts", "p"], ["c", "--prompts", "p", "--out", "o", "--keep", "some"],
     ["c", "--prompts", "p", "--out", "o", "--n", "0"]],
)  # fmt: skip
def test_wrong_usage_exits_2(arguments):
    assert run(*arguments).returncode == 2

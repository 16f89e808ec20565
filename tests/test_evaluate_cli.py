"""tools/evaluate.py as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.posttrain import toy

ROOT = Path(__file__).parents[1]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "tools/evaluate.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    lines = [{"prompt": f"make {n}", "numbers": [n, 1], "target": n + 1} for n in range(3)]
    return toy.write_lines(folder / "problems.jsonl", lines)


@pytest.mark.heavy
def test_figures_and_samples_are_written(problems, tmp_path):
    checkpoint = toy.write_hf(tmp_path / "r1", "Qwen2", "R1")
    (tmp_path / "mine.py").write_text(
        "def worth(completion, problem): return float(problem['target'] > 1)\n"
    )
    done = run(
        checkpoint, "--problems", problems, "--reward", f"{tmp_path}/mine.py:worth", "--n", 4,
        "--k", 2, 4, "--max-new-tokens", 6, "--dtype", "float32", "--json", tmp_path / "f.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert [found[name] for name in ("pass@1", "pass@2", "pass@4", "greedy")] == [2 / 3] * 4
    assert found["intervals"]["pass@1"]["kind"] == "wilson" and found["count"] == 3
    assert [len(each["samples"]) for each in found["results"]] == [4, 4, 4]
    assert found["results"][0]["place"].endswith("problems.jsonl:1")
    assert "66.7 %" in done.stdout and "samples: 100%" in done.stderr


def test_bad_input_is_told_in_one_message(problems):
    done = run("gone", "--problems", problems, "--reward", "math")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "problems.jsonl:1: reward 'math': 'answer' is None" in done.stderr


@pytest.mark.parametrize("more", [[], ["--problems", "f", "--n", "0"]])
def test_wrong_usage_exits_2(more):
    assert run("gone", *more).returncode == 2

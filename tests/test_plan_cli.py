"""tools/plan.py draws a schedule and prints its figures, without a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd=ROOT):
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "no_such_platform"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/plan.py"), *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def schedule(name, stages, microbatches):
    return ("--schedule", name, "--stages", str(stages), "--microbatches", str(microbatches))


def test_command_draws_and_prints(tmp_path):
    done = run(*schedule("dualpipe", 8, 20), "--out", "F.png", "--json", "F.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dualpipe: 8 stages on 8 ranks, 20 micro-batches" in done.stdout
    assert "(P/2-1)(F&B+B-3W)" in done.stdout
    assert (tmp_path / "F.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "F.json").read_text())["makespan"] == 66


def test_command_prints_only_json():
    done = run(*schedule("zb1p", 4, 8), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bubble"] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (schedule("dualpipe", 4, 6), 1, "at least 2 x stages"),
        (schedule("zigzag", 4, 8), 1, "there is no schedule 'zigzag'"),
        ((*schedule("1f1b", 2, 2), "--out", "none/F.png"), 1, "No such file or directory: none/F"),
        (schedule("1f1b", "two", 8), 2, "--stages: invalid int value"),
        (("--schedule", "1f1b"), 2, "--stages, --microbatches"),
    ],
)
def test_command_refuses(tmp_path, arguments, code, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr

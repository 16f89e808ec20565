"""tools/plan.py draws a schedule or plans a step on a slice, without a device."""

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


TINY, TUNED = str(ROOT / "configs/tiny.py"), str(ROOT / "configs/sft_tiny.py")


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


def test_command_estimates_a_step_without_the_compiler(tmp_path):
    done = run(TINY, "--topology", "v5e:2x4", "--no-compile", "--json", "F.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train step on v5e:2x4, 8 devices" in done.stdout and "fits" in done.stdout
    plan = json.loads((tmp_path / "F.json").read_text())
    wanted = {"peak_bytes_per_device", "fits", "program_flops", "model_flops", "roofline"}
    assert wanted <= set(plan) and plan["fits"]


def test_command_plans_each_program_of_reinforcement_learning():
    done = run(
        str(ROOT / "configs/r1_zero_v3.py"), "--init", str(ROOT / "configs/v3_671b.py"),
        "--topology", "v5p:8x8x8", "--no-compile", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    plans = [plan, *plan["others"]]
    assert [each["step"] for each in plans] == ["train", "score", "decode"]
    assert all(each["fits"] for each in plans)
    weights = 671_026_419_200 / 512
    state, reference = (4 + 2 + 2) * weights, 2 * weights
    assert plans[0]["argument_bytes"] > state + reference
    assert all(each["beside_bytes"] > state + reference for each in plans[1:])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (schedule("dualpipe", 4, 6), 1, "at least 2 x stages"),
        (schedule("zigzag", 4, 8), 1, "there is no schedule 'zigzag'"),
        ((*schedule("1f1b", 2, 2), "--out", "none/F.png"), 1, "there is no folder none; make it"),
        (schedule("1f1b", "two", 8), 2, "--stages: invalid int value"),
        (("--schedule", "1f1b"), 2, "--stages, --microbatches"),
        ((), 2, "required: CONFIG, --topology"),
        ((TINY,), 2, "required: --topology"),
        ((TINY, *schedule("1f1b", 2, 2)), 2, "CONFIG: not together with --stages"),
        ((TINY, "--topology", "v5e:4x4", "--out", "F.png"), 2, "--out: not together with CONFIG"),
        ((TINY, "--topology", "v5:4x4"), 1, "did you mean v5p:8x8x8 or v5e:4x4"),
        ((TUNED, "--topology", "v5e:2x4"), 1, "takes its model from the checkpoint"),
        ((TUNED, *schedule("1f1b", 2, 2)), 2, "CONFIG: not together with --stages"),
    ],
)
def test_command_refuses(tmp_path, arguments, code, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr

"""tools/sft.py as a command: what it refuses before it loads anything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sft(*arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/sft.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 1, "sft_tiny begins with a checkpoint; name it: --init CKPT"),
        (
            ("--init", "x", "--set", "sft.file=a"),
            2,
            "sft.file is not a config key; did you mean sft",
        ),
        (("--init", "x", "--set", "model.dim=8"), 2, "model.dim cannot be set: model comes whole"),
        (("configs/tiny.py", "--init", "x"), 1, "run tools/train.py with it"),
        (("--init", "nowhere"), 1, "nowhere"),
        (("--frobnicate",), 2, "unrecognized arguments: --frobnicate"),
    ],
    ids=["no init", "key", "model", "another root", "no checkpoint", "usage"],
)
def test_wrong_use_ends_with_one_message(arguments, code, message):
    returned, said = sft(*arguments)
    assert returned == code and message in said and "Traceback" not in said

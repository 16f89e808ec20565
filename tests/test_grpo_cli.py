"""tools/grpo.py as a command: what it refuses before it loads anything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def grpo(*arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/grpo.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
    )
    return done.returncode, done.stderr


CONFIG = "configs/grpo_countdown.py"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((CONFIG,), 1, "grpo_countdown begins with a checkpoint; name it: --init CKPT"),
        ((CONFIG, "--init", "x", "--set", "rl.kl=k1"), 1, "must be one of k3, rho_k3"),
        (
            (CONFIG, "--init", "x", "--set", "rl.minibatch=4"),
            1,
            "rl.minibatch is not a config key; did you mean rl.minibatches",
        ),
        (
            (CONFIG, "--init", "x", "--set", "rl.group_size=1"),
            1,
            "rl.group_size=1 must be at least 2",
        ),
        (("configs/tiny.py", "--init", "x"), 1, "ends with `config = Reinforcement(...)`"),
        ((CONFIG, "--init", "nowhere"), 1, "nowhere"),
        ((), 2, "the following arguments are required: CONFIG"),
    ],
    ids=["no init", "k1", "key", "group", "another root", "no checkpoint", "usage"],
)
def test_wrong_use_ends_with_one_message(arguments, code, message):
    returned, said = grpo(*arguments)
    assert returned == code and message in said and "Traceback" not in said

"""tools/grpo.py as a command: what it refuses before it loads anything, and what kills leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsjax.checkpoint import manifest, store
from tests.posttrain import toy

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
        ((CONFIG, "--init", "x", "--set", "rl.kl=k1"), 2, "must be one of k3, rho_k3"),
        (
            (CONFIG, "--init", "x", "--set", "rl.minibatch=4"),
            2,
            "rl.minibatch is not a config key; did you mean rl.minibatches",
        ),
        (
            (CONFIG, "--init", "x", "--set", "rl.group_size=1"),
            2,
            "rl.group_size=1 must be at least 2",
        ),
        (("configs/tiny.py", "--init", "x"), 1, "run tools/train.py with it"),
        ((CONFIG, "--init", "nowhere"), 1, "nowhere"),
        ((), 1, "grpo_countdown begins with a checkpoint; name it: --init CKPT"),
        ((CONFIG, "more"), 2, "unrecognized arguments: more"),
    ],
    ids=["no init", "k1", "key", "group", "another root", "no checkpoint", "no config", "usage"],
)
def test_wrong_use_ends_with_one_message(arguments, code, message):
    returned, said = grpo(*arguments)
    assert returned == code and message in said and "Traceback" not in said


TIMES = ("seconds", "per_second", "mfu", "memory_bytes")
SETTINGS = [
    "rl.prompts=4", "rl.group_size=4", "rl.minibatches=2", "rl.max_new_tokens=24", "rl.beta=0.1",
    "rl.reference_every=3", "rl.log_samples=-1", "rl.top_p=0.9", "train.steps=6",
    "rl.sequence_length=0",
    "train.batch_size=4", "train.log_every=1", "train.checkpoint_every=1", "train.eval_every=0",
    "train.keep=2", "train.tensorboard=false", "optim.learning_rate=3e-3",
    "precision.compute=float32",
]  # fmt: skip


def killed_in(phase, place, workdir):
    """The command, which is killed in a phase of its second step; its output is a file."""
    command = [
        sys.executable, "-m", "tests.posttrain.kill_phases", phase, CONFIG, "--init",
        str(place / "V3"), "--workdir", str(workdir), "--set", *SETTINGS,
        f"rl.problems={place}/train.jsonl", f"rl.rewards={place}/mine.py:low", "rl.heldout=",
    ]  # fmt: skip
    # One device, and programs that are compiled quickly rather than quick.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    with (place / f"{workdir.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def left_by(folder):
    """What a finished run leaves, without times."""
    newest = manifest.verify(folder / "checkpoints/6")
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [{k: line[k] for k in line if not k.endswith(TIMES)} for line in logged]
    samples = (folder / "samples.jsonl").read_text().splitlines()
    return newest.leaves, newest.record["data"], logged, samples


@pytest.mark.slow
def test_run_killed_in_every_phase_ends_with_the_same_bits(tmp_path):
    """One run is killed four times, each time in another phase, and a run beside it never; a second
    command in the folder of one that lives is refused.
    """
    toy.write_hf(tmp_path / "V3")
    problems = [{"prompt": f"{n}?", "answer": str(n)} for n in range(9)]
    toy.write_lines(tmp_path / "train.jsonl", problems)
    (tmp_path / "mine.py").write_text(
        "def low(completion, problem):\n"
        "    return sum(c < 'A' for c in completion) / max(len(completion), 1)\n"
    )
    whole = tmp_path / "whole"
    process = killed_in("none", tmp_path, whole)
    while not (whole / "lock").is_file() or not (whole / "lock").read_text():
        assert process.poll() is None, (tmp_path / "whole.log").read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGSTOP)
    second = killed_in("none", tmp_path, whole)
    assert second.wait() == 1
    os.kill(process.pid, signal.SIGCONT)
    code, said = process.wait(), (tmp_path / "whole.log").read_text()
    assert code == 0, said
    assert f"whole is in use by process {process.pid} on" in said and "Traceback" not in said
    run, reached = tmp_path / "run", []
    for phase in ("rollout", "grading", "update", "save"):
        code = killed_in(phase, tmp_path, run).wait()
        assert code == -signal.SIGKILL, (phase, (tmp_path / "run.log").read_text())
        reached.append(store.latest(run / "checkpoints") or 0)
    assert killed_in("none", tmp_path, run).wait() == 0
    # A save goes on beside the next step, so a kill there may undo it.
    assert reached == sorted(reached) and reached[-1] < 6
    for got, wanted in zip(left_by(run), left_by(whole), strict=True):
        assert got == wanted

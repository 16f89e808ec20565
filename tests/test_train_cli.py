"""tools/train.py as a user meets it: help, wrong usage, Ctrl-C, SIGTERM, resume."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = """
from dsjax.config import Config, DataConfig, ModelConfig, PrecisionConfig, TrainConfig

config = Config(
    name="dense",
    model=ModelConfig(
        vocab_size=300, dim=16, n_layers=1, n_heads=2, n_dense_layers=1, inter_dim=32,
        attention="gqa", max_seq_len=16,
    ),
    data=DataConfig(
        files="{root}/*.txt", heldout_fraction=0.3, sequence_length=16, cache_dir="{root}/cache"
    ),
    train=TrainConfig(
        steps=1_000_000, batch_size=4, log_every=1, eval_every=0, checkpoint_every=0,
        tensorboard=False,
    ),
    precision=PrecisionConfig(compute="float32"),
)
"""


def environment():
    """That of these tests, with one device."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}


def start(*arguments, **options):
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("train_cli")
    for number in range(8):
        (root / f"{number}.txt").write_text(
            "the quick brown fox jumps over the lazy dog. " * (number + 2)
        )
    (root / "config.py").write_text(CONFIG.format(root=root))
    return root


def test_help_is_quick_and_needs_no_jax():
    begin = time.monotonic()
    process = start("--help")
    output, _ = process.communicate(timeout=60)
    seconds = time.monotonic() - begin
    assert (
        process.returncode == 0
        and "python tools/train.py configs/tiny.py --set train.steps=300" in output
    )
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "tools" / "train.py"), "--help"],
        env=environment(),
        capture_output=True,
        text=True,
    ).stderr
    assert re.search(r"\| +dsjax\.command$", loaded, re.M)
    assert not re.search(r"\| +(jax|orbax|grain|numpy)\b", loaded)
    assert seconds < 5  # about 0.1 on an idle machine; the imports above are the sharp test


def test_wrong_usage_and_a_bad_key_exit_2():
    process = start("--set", "train.stepz=3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        "train.stepz is not a config key; did you mean train.steps?" in errors
        and "Traceback" not in errors
    )
    process = start("--nonsense")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "--nonsense" in errors


def interrupt(folder, number):
    """Starts or resumes the run, signals it once it steps, and gives its code, its output and its
    newest step.
    """
    process = start(folder / "config.py", "--workdir", folder / "run")
    output = []
    for line in process.stdout:
        output.append(line)
        if re.match(r"step \d\d/", line):
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    steps = [int(path.name) for path in (folder / "run" / "checkpoints").iterdir()]
    return process.returncode, "".join(output) + rest, max(steps)


def test_sigterm_and_ctrl_c_save_and_the_run_resumes(folder):
    code, output, first = interrupt(folder, signal.SIGTERM)
    assert code == 143 and f"saved after step {first}; to resume: python " in output
    code, output, second = interrupt(folder, signal.SIGINT)
    assert code == 130 and f"after step {first} of 1000000" in output
    assert f"saved after step {second}; to resume: python " in output and second > first
    steps = [
        json.loads(line)["step"]
        for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, second + 1))


def announced(process, words):
    """Reads what a process says up to the line that holds the words, and gives that line."""
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(process.stderr.read())


@pytest.mark.heavy
def test_signal_in_compilation_ends_the_run_before_its_first_step(folder):
    process = start(folder / "config.py", "--workdir", folder / "compiling")
    announced(process, "compiling the training step")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "SIGTERM received: stopping" in errors
    assert "Traceback" not in errors
    assert not [*(folder / "compiling" / "checkpoints").glob("*")]


@pytest.mark.heavy
def test_second_signal_leaves_at_once_and_the_run_goes_on_from_its_last_checkpoint(folder):
    each = ["--set", "train.checkpoint_every=5"]
    process = start(folder / "config.py", "--workdir", folder / "twice", *each)
    announced(process, "step 12/")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode in (130, 143) and "Traceback" not in errors
    assert "saved after step" not in rest
    process = start(folder / "config.py", "--workdir", folder / "twice", *each)
    line = announced(process, "resuming ")
    assert int(re.search(r"after step (\d+) of", line)[1]) % 5 == 0
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143

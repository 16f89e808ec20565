"""tools/prepare.py as a user runs it: wrong usage, and kills that change nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def command(*arguments):
    return [sys.executable, "tools/prepare.py", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either RECIPE or --input"),
        (["r.py", "--input", "x"], "give either RECIPE or --input"),
        (["r.py", "--kind", "web"], "in a recipe each source has its own"),
        (["r.py", "--workers", "0"], "--workers is at least 1"),
        (["r.py", "--num-processes", "2"], "--num-processes and --process-id go together"),
        (["r.py", "--num-processes", "2", "--process-id", "2"], "--process-id counts from 0"),
    ],
)
def test_wrong_usage(arguments, message, tmp_path):
    found = run("--out", tmp_path / "out", *arguments)
    assert found.returncode == 2 and message in found.stderr
    assert not (tmp_path / "out").exists()


def test_no_files_is_one_message(tmp_path):
    found = run("--input", f"{tmp_path}/*.txt", "--kind", "code", "--out", tmp_path / "out")
    assert found.returncode == 1 and not found.stdout
    (line,) = found.stderr.splitlines()
    assert "source input: files=" in line and "matches no file" in line


def files(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.endswith(".partial")
    }


@pytest.mark.heavy
def test_kills_of_workers_and_of_all_change_nothing(tmp_path):
    for number in range(300):
        words = " ".join(f"name_{number}_{n} = {n} * {number}\n" for n in range(400))
        (tmp_path / f"{number:03}.py").write_text(f"# file {number}\n" + words.replace("\n ", "\n"))
    given = ("--input", f"{tmp_path}/*.py", "--kind", "code", "--set", "shard_bytes=20000")
    given += ("rules=code.any.comments=off",)
    assert run(*given, "--out", tmp_path / "calm", "--workers", "1").returncode == 0
    harmed = 0
    for seconds in (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0):
        process = subprocess.Popen(
            command(*given, "--out", tmp_path / "killed", "--workers", "2"),
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        victim = int(children[-1]) if children and seconds in (2.5, 3.5) else process.pid
        os.kill(victim, signal.SIGKILL)
        harmed += process.wait() != 0
    assert harmed
    assert run(*given, "--out", tmp_path / "killed", "--workers", "2").returncode == 0
    assert files(tmp_path / "killed") == files(tmp_path / "calm")

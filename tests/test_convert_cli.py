"""tools/convert.py as a user runs it: there and back, inspection, failures, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import pytest

from dsjax.checkpoint.tensor_files import open_folder
from tests.checkpoint.conversions import hashes
from tests.checkpoint.hf_files import plain, write
from tests.golden.cases import CASES

ROOT = Path(__file__).parents[1]
LLAMA = CASES["llama"]


def command(*arguments):
    return [sys.executable, str(ROOT / "tools" / "convert.py"), *map(str, arguments)]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}


def run(*arguments):
    return subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "llama"
    config = LLAMA.config | {"torch_dtype": "bfloat16"}
    write(folder, config, plain(LLAMA, ml_dtypes.bfloat16))
    return folder


def test_convert_goes_there_and_back(published, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    done = run("import", published, ours)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    n_tensors = len(open_folder(published).tensors)
    assert first.startswith(f"{n_tensors} tensors, ") and first.endswith(f"; all in {ours}")
    assert second == f"next: python tools/generate.py {ours}"
    done = run("export", ours, back, "--dtype", "keep")
    assert done.returncode == 0, done.stderr
    assert hashes(back)["model.safetensors"] == hashes(published)["model.safetensors"]
    assert json.loads((back / "config.json").read_text()) == json.loads(
        (published / "config.json").read_text()
    )


def test_inspect_prints_json_of_a_config_alone(published, tmp_path):
    done = run("inspect", published / "config.json", "--expect", "--json")
    assert done.returncode == 0, done.stderr
    folder = open_folder(published)
    summary = json.loads(done.stdout)
    assert summary["tensor_count"] == len(folder.tensors)
    assert summary["total_bytes"] == sum(info.n_bytes for info in folder.tensors.values())
    done = run("inspect", published)
    assert done.returncode == 0 and "model.layers.*.self_attn.k_proj.weight" in done.stdout


def test_convert_fails_with_one_message(published, tmp_path):
    done = run("import", published, published / "inside")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("convert.py: error: ") and "is inside" in done.stderr
    done = run("export", published, tmp_path / "out", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert run("import", published, tmp_path / "out", "--dtype", "int8").returncode == 2
    assert run("import", published).returncode == 2


# Slows the import down, so that a signal comes in the middle of it. Where the tests run in the
# background of a shell, their children ignore Ctrl-C unless they say otherwise.
_SLOW = """
import runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from dsjax.checkpoint import weights
write = weights.WeightsWriter.write
def slow(*arguments):
    time.sleep(0.2)
    return write(*arguments)
weights.WeightsWriter.write = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.heavy)],
)
def test_stopped_import_says_that_it_resumes(published, tmp_path, number, code):
    slow = [sys.executable, "-c", _SLOW, *command("import", published, tmp_path / "out")[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(slow, env=ENVIRONMENT, **pipes)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    limit = time.monotonic() + 60
    while not journal.exists() or len(journal.read_text().splitlines()) < 3:
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors, errors
    assert "out.partial; the same command continues from there" in output
    done = run("import", published, tmp_path / "out")
    assert done.returncode == 0 and done.stdout.startswith("continuing after ")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_help_needs_no_jax():
    python = [sys.executable, "-X", "importtime"]
    done = subprocess.run(
        [*python, *command("--help")[1:]], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "python tools/convert.py import" in done.stdout
    assert "dsjax.command" in done.stderr
    assert not any(f" {name}\n" in done.stderr for name in ("jax", "numpy", "rich", "orbax"))


def test_gguf_file_is_written_and_described(published, tmp_path):
    done = run("export", published, tmp_path / "m.gguf", "--type", "Q8_0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"next: python tools/convert.py inspect {tmp_path / 'm.gguf'}"
    )
    done = run("inspect", tmp_path / "m.gguf", "--json")
    found = json.loads(done.stdout)
    assert found["architecture"] == "llama" and "Q8_0" in found["types"]
    assert found["total_bytes"] == sum(kind["bytes"] for kind in found["types"].values())

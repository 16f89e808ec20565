"""`make bench-gpu` on machines without a GPU: what becomes of its parts, and (slow) a dry run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import bench_gpu, gpu_parts
from tests.bench.bench_gpu import Part
from tests.plan.test_kernels import TEXT

ROOT = Path(__file__).parents[1]


def python(title, code, limit=60.0):
    return Part(title, limit, (sys.executable, "-c", code))


def figures(folder):
    return {each["title"]: each for each in json.loads((folder / "figures.json").read_text())}


def test_part_that_crashes_or_hangs_loses_nothing_but_itself(tmp_path):
    parts = {
        "good": python("Good", 'print("words"); print(\'{"batch": 1, "ms": 2.5}\')'),
        "crashes": python("Crashes", "print('{\"batch\": 8}', flush=True); 1 / 0"),
        # What it started must end with it, or its output would stay open.
        "hangs": python("Hangs", "import subprocess; subprocess.run(['sleep', '600'])", limit=1.0),
        "last": python("Last", "print('{\"batch\": 64}')"),
    }
    bench_gpu.run_all(parts, tmp_path, "# One GPU\n", budget=600.0)
    found = figures(tmp_path)
    assert found["Good"]["figures"] == [{"batch": 1, "ms": 2.5}]
    assert found["Good"]["problem"] == found["Last"]["problem"] == ""
    assert found["Crashes"]["figures"] == [{"batch": 8}]
    assert found["Crashes"]["problem"] == "it ended with 1"
    assert "ZeroDivisionError" in found["Crashes"]["said"]
    assert found["Hangs"]["problem"] == "it was ended after 1 s"
    record = (tmp_path / "record.md").read_text()
    assert record.startswith("# One GPU\n\n## Good\n")
    assert "| batch | ms |\n|---|---|\n| 1 | 2.5 |\n" in record
    assert "Not finished: it ended with 1." in record


def test_record_is_there_after_each_part(tmp_path):
    """A part sees the record of those before it, whatever becomes of the script later."""
    reads = f"print(open({str(tmp_path / 'record.md')!r}).read().count('## First'))"
    parts = {"first": python("First", "pass"), "second": python("Second", f"{reads}; 1 / 0")}
    bench_gpu.run_all(parts, tmp_path, "", budget=600.0)
    assert figures(tmp_path)["Second"]["said"].startswith("1\n")


def test_parts_that_find_no_time_are_named(tmp_path):
    bench_gpu.run_all({"late": python("Late", "print('{}')")}, tmp_path, "", budget=0.0)
    assert figures(tmp_path)["Late"]["problem"] == "no time was left for it"


def test_limits_of_the_important_parts_fit_into_the_time():
    parts = bench_gpu.parts(dry_run=False, flags=["--xla"])
    assert list(parts)[:3] == ["kernels", "decode", "train-3B"]
    first = sum(part.limit for part in list(parts.values())[:6])
    assert first < bench_gpu.BUDGET
    assert dict(parts["buffers"].environment)["XLA_FLAGS"].endswith("--xla")
    assert "buffers" not in bench_gpu.parts(dry_run=False, flags=[])


def test_without_a_gpu_it_says_what_to_install(monkeypatch):
    ended = subprocess.CompletedProcess([], bench_gpu.NO_GPU, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(SystemExit, match="JAX finds no GPU here: install the extra `cuda`"):
        bench_gpu.heading(dry_run=False, flags=[])


def test_kernels_of_a_program_that_decodes_on_a_gpu_are_read(monkeypatch):
    """Which a dry run, on a CPU, does not do."""
    monkeypatch.setattr(gpu_parts.jax, "default_backend", lambda: "gpu")
    steps = gpu_parts.steps_of(TEXT, gpu_parts.MODEL_TINY, 8)
    assert steps and steps.body.starts
    assert (
        gpu_parts.steps_of(TEXT.replace("jit_decode", "jit_prefill"), gpu_parts.MODEL_TINY, 8)
        is None
    )


@pytest.mark.slow
def test_dry_run_takes_every_part_to_its_end(tmp_path):
    command = [sys.executable, "-m", "tests.bench.bench_gpu", "--dry-run", "--out", str(tmp_path)]
    # Without the eight devices that tests have.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = figures(tmp_path)
    assert all(each["figures"] and not each["problem"] for each in found.values())
    assert len(found) >= 10
    assert "Not a measurement: a dry run on a CPU" in (tmp_path / "record.md").read_text()


def test_flags_that_xla_does_not_know_are_left_out():
    known = "--xla_force_host_platform_device_count=2"
    assert bench_gpu.accepted([known, "--xla_gpu_no_such_flag=1"]) == [known]

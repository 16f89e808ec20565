"""A pipeline of stages on a model that learns next to nothing: what runs, what is kept, what is
skipped. `configs/pipelines/r1_tiny.py` is the pipeline, made smaller.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dsjax import settings
from dsjax.config.r1 import Samples
from dsjax.posttrain import stages

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "pipelines" / "r1_tiny.py"


ANSWERS = Samples(stage="base", problems="{run}/game/held_out.jsonl", n=4, keep="all")


def smaller(stage):
    """Two steps of the stage; it learns from answers of the base model."""
    changes = ["train.steps=2", "train.batch_size=8", "train.tensorboard=off"]
    own = settings.override(stage.config, changes)
    return dataclasses.replace(stage, config=own, samples=stage.samples and ANSWERS)


@pytest.fixture(scope="module")
def config():
    return short(("base", "cold_start"))


def short(few):
    """The pipeline of these stages, each of two steps."""
    whole = stages.load(CONFIG)
    return dataclasses.replace(
        whole,
        stages=tuple(smaller(stage) for stage in whole.stages if stage.name in few),
        game=dataclasses.replace(whole.game, n_texts=400, n_cold=400, n_held_out=20),
        n=2,
        max_new_tokens=16,
        examples=2,
    )


PIPELINE = """
from tests.posttrain import test_stages

config = test_stages.short(("base", "rejection"))
"""


@pytest.mark.slow
def test_two_processes_run_stages_that_learn_from_answers(tmp_path):
    """One of them draws, judges and writes; a second call finds everything done."""
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    for said in ("samples of 20 prompts", "is finished"):
        outputs = run_two(tmp_path, str(tmp_path / "pipeline.py"), "--workdir", str(tmp_path / "r"))
        assert said in outputs[0] and "samples of 20 prompts" not in outputs[1]
    reports = json.loads((tmp_path / "r/r1.json").read_text())
    assert [report["name"] for report in reports] == ["base", "rejection"]
    report = json.loads((tmp_path / "r/rejection/samples.jsonl.report.json").read_text())
    assert report["samples"] == 80 and report["kept"] > 0
    assert not (tmp_path / "r/rejection/samples.jsonl.parts").exists()


def run_two(folder, *arguments):
    """Returns what two processes of tools/r1.py print, once both have ended well."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    given = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id"]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    both = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tools/r1.py"), *arguments, *given, str(index)],
            env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n\n".join(outputs)
    return outputs


def quiet():
    return Console(quiet=True)


@pytest.mark.heavy
def test_stages_run_in_order_and_only_once(config, tmp_path):
    assert stages.run(config, tmp_path, command="again", console=quiet()) == 0
    reports = json.loads((tmp_path / "r1.json").read_text())
    assert [report["name"] for report in reports] == ["base", "cold_start"]
    for report in reports:
        assert 0 <= report["accuracy_low"] <= report["accuracy"] <= report["accuracy_high"] <= 1
        assert report["accuracy"] == report["pass_at_k"]["1"] <= report["pass_at_k"]["2"]
        assert 1 <= report["length"] <= 16 and report["entropy"] > 0 and report["seconds"] > 0
        assert 0 <= report["format"] <= 1
        assert len(report["samples"]) == 2 and "\n" in report["samples"][0]["prompt"]
    assert (tmp_path / "r1.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((tmp_path / "cold_start" / "config.json").read_text())
    assert kept["init"] == str(tmp_path / "base") and kept["sft"]["files"].startswith(str(tmp_path))

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(before) == 2
    assert stages.run(config, tmp_path, command="again", console=quiet()) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert json.loads((tmp_path / "r1.json").read_text()) == reports

    other = dataclasses.replace(config, n=3)
    with pytest.raises(ValueError, match="holds another pipeline, or this one with other settings"):
        stages.run(other, tmp_path, command="again", console=quiet())


def test_settings_name_their_stage():
    config = stages.load(CONFIG, ["reasoning.train.steps=7", "base.optim.learning_rate=1e-4"])
    by_name = {stage.name: stage.config for stage in config.stages}
    assert by_name["reasoning"].train.steps == 7 and by_name["r1_zero"].train.steps != 7
    assert by_name["base"].optim.learning_rate == 1e-4
    for wrong, message in {
        "train.steps=7": "write STAGE.KEY=VALUE, with one of the stages base, r1_zero",
        "base.train.stpes=7": "stage base: train.stpes is not a config key",
        "base": "write STAGE.KEY=VALUE",
    }.items():
        with pytest.raises(ValueError, match=message):
            stages.load(CONFIG, [wrong])
    with pytest.raises(FileNotFoundError, match="there is no config elsewhere"):
        stages.load("elsewhere.py")

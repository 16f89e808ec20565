"""What is said of checkpoints: whole, damaged, missing, different."""

import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

from dsjax.checkpoint import audit, store
from tests.checkpoint.damage import flip
from tests.test_repository import ROOT


@pytest.fixture
def run(tmp_path):
    """Steps 2 and 10, which differ in one of two arrays and in their records."""
    checkpoints = store.Store(tmp_path / "checkpoints", keep=2)
    for step in (2, 10):
        params = {"same": jnp.ones((4, 8)), "other": jnp.full(3, step, jnp.float32)}
        record = {"step": step, "versions": {"nproc": 2}, "seconds": 1.0}
        checkpoints.save(step, {"params": params}, record)
    checkpoints.close()
    return tmp_path


def test_newest_or_named_checkpoint_is_verified(run):
    newest = audit.verify(run)
    assert newest["fine"] and newest["step"] == 10 and newest["arrays"] == 2
    assert "10  2 arrays" in (line := audit.describe(newest)) and "as it was written" in line
    assert audit.verify(run / "checkpoints" / "2")["step"] == 2
    flip(run / "checkpoints" / "10" / "state" / "_sharding", 4)
    found = audit.verify(run)
    assert not found["fine"] and "DAMAGED in 1 files\n  " in audit.describe(found)
    assert "_sharding is damaged" in found["problems"][0]


def test_run_is_listed_with_what_was_set_aside(run):
    assert [entry["step"] for entry in audit.survey(run)["checkpoints"]] == [2, 10]
    shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / "11.damaged")
    (run / "checkpoints" / "2" / "manifest.json").unlink()
    listing = audit.survey(run)
    assert not listing["fine"] and [entry["fine"] for entry in listing["checkpoints"]] == [
        False,
        True,
        False,
    ]
    lines = [audit.describe(entry) for entry in listing["checkpoints"]]
    assert "manifest.json is missing" in lines[0] and "11.damaged  was set aside" in lines[2]


def test_file_named_like_a_step_is_none(run):
    (run / "checkpoints" / "11").write_text("notes")
    assert [entry["step"] for entry in audit.survey(run)["checkpoints"]] == [2, 10]
    assert audit.verify(run)["step"] == 10


@pytest.mark.parametrize("report", [audit.verify, lambda path: audit.compare(path, path)])
def test_published_folder_is_told_from_a_damaged_one(tmp_path, report):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a Hugging Face folder, which has no manifest; tools/"):
        report(tmp_path)


def test_differences_are_listed_by_array_and_record(run):
    folders = run / "checkpoints" / "2", run / "checkpoints" / "10"
    assert audit.compare(*folders) == {
        "fine": False,
        "differences": ["array params.other: other values", "record step: 2 -> 10"],
    }
    assert audit.compare(folders[0], folders[0])["fine"]


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(ValueError, match="is not a folder; name a run"):
        audit.verify(tmp_path / "none")
    with pytest.raises(ValueError, match="so it is not the folder of a run"):
        audit.survey(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no checkpoint yet"):
        audit.verify(tmp_path)


def test_command_says_so_with_its_exit_code(run):
    def execute(*words):
        command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / "checkpoint.py")]
        done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT)
        assert "Traceback" not in done.stderr and " jax\n" not in done.stderr
        return done

    assert execute("verify", str(run)).returncode == 0
    flip(run / "checkpoints" / "2" / "state" / "_METADATA", 77)
    done = execute("list", str(run))
    assert done.returncode == 1 and "_METADATA is damaged" in done.stdout

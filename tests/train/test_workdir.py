"""Whose folder it is, and which keys a resumed run may change."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from dsjax import settings
from dsjax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from dsjax.config.finetuning import FineTuning
from dsjax.config.janus import Janus
from dsjax.config.preference import Preference
from dsjax.config.reinforcement import Reinforcement
from dsjax.train import workdir

CONFIG = Config(
    name="mine",
    model=ModelConfig(
        vocab_size=64,
        dim=16,
        n_layers=1,
        n_heads=2,
        n_dense_layers=1,
        inter_dim=32,
        attention="gqa",
        max_seq_len=8,
    ),
    data=DataConfig(sequence_length=8),
    train=TrainConfig(steps=10),
)


def change(config, **groups):
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in groups.items()
        },
    )


def begin(folder, config):
    """A run that has done its first step."""
    workdir.claim(folder, config)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')


def test_claim_writes_config_and_versions(tmp_path):
    workdir.claim(tmp_path / "new" / "run", CONFIG)
    stored = json.loads((tmp_path / "new" / "run" / "config.json").read_text())
    assert stored["train"]["steps"] == 10 and stored["model"]["dim"] == 16
    versions = json.loads((tmp_path / "new" / "run" / "versions.json").read_text())
    assert {"jax", "flax", "nproc", "commit", "device_kind"} <= versions.keys()


def test_claim_lists_every_key_of_another_config(tmp_path):
    begin(tmp_path, CONFIG)
    other = change(CONFIG, model={"dim": 32}, optim={"learning_rate": 0.1}, train={"steps": 9})
    with pytest.raises(
        ValueError, match=r"holds a run of another config.*Use another --workdir"
    ) as error:
        workdir.claim(tmp_path, other)
    for part in (
        "model.dim was 16 and is now 32",
        "optim.learning_rate was 0.00022 and is now 0.1",
        "train.steps was 10 and is now 9",
    ):
        assert part in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["dim"] == 16


def test_claim_takes_a_folder_in_which_no_step_was_done(tmp_path):
    workdir.claim(tmp_path, CONFIG)
    workdir.claim(tmp_path, change(CONFIG, optim={"learning_rate": 0.1}))
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["learning_rate"] == 0.1


def test_claim_lets_bookkeeping_mesh_and_length_change(tmp_path):
    begin(tmp_path, CONFIG)
    longer = change(CONFIG, train={"steps": 20, "eval_every": 0, "keep": 9, "log_every": 3})
    workdir.claim(tmp_path, dataclasses.replace(longer, mesh=MeshConfig(data=1, fsdp=4)))
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 20


def test_claim_keeps_the_length_of_a_ramped_run(tmp_path):
    """A ramp is a share of the steps, so more of them would change the batches that are behind."""
    ramped = change(
        CONFIG, train={"batch_size_start": 4, "micro_batch_size": 4, "batch_ramp_fraction": 0.5}
    )
    begin(tmp_path, ramped)
    with pytest.raises(ValueError, match=r"train\.steps was 10 and is now 20"):
        workdir.claim(tmp_path, change(ramped, train={"steps": 20}))


def test_claim_takes_a_run_of_an_older_version(tmp_path, caplog):
    """Keys added since stand at their defaults; one that is set otherwise makes another run."""
    begin(tmp_path, CONFIG)
    values = json.loads((tmp_path / "config.json").read_text())
    for group, key in (
        ("train", "sequence_balance"),
        ("train", "compare_every"),
        ("optim", "epsilon"),
    ):
        del values[group][key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"another config: optim\.epsilon was 1e-08 and is now 0\.1"
    ):
        workdir.claim(tmp_path, change(CONFIG, optim={"epsilon": 0.1}))
    workdir.claim(tmp_path, CONFIG)
    assert "lacks train.sequence_balance, train.compare_every, optim.epsilon;" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["epsilon"] == 1e-8


def test_claim_refuses_checkpoints_without_a_config(tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds checkpoints but no config\.json"):
        workdir.claim(tmp_path, CONFIG)


def test_claim_refuses_a_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"config\.json is not JSON.*; use another --workdir"):
        workdir.claim(tmp_path, CONFIG)


def test_changed_versions_names_what_differs():
    then = workdir.versions() | {"nproc": 0}
    assert workdir.changed_versions(then) == [f"nproc 0 -> {workdir.versions()['nproc']}"]


def test_git_commit_is_none_outside_a_repository(tmp_path):
    assert workdir.git_commit(tmp_path) is None


def test_optim_keys_are_not_free():
    """The list of free keys is of prefixes: none may swallow a key that changes the training."""
    keys = settings.flatten(CONFIG) | settings.flatten(FineTuning(name="x"))
    keys |= settings.flatten(Preference(name="x")) | settings.flatten(Reinforcement(name="x"))
    keys |= settings.flatten(Janus(name="x"))
    free = {key for key in keys if key.startswith(workdir._FREE)}
    meshes = "mesh.", "rollout_mesh."
    assert free == {*workdir._FREE}.difference(meshes) | {k for k in keys if k.startswith(meshes)}
    assert not any(key.startswith("optim.") for key in free)


@pytest.mark.parametrize(
    ("root", "group", "key", "value"),
    [
        (Janus, "janus", "cache_dir", "elsewhere"),
        (Reinforcement, "rl", "log_samples", 1),
        (Reinforcement, "rl", "flat_after", 0),
    ],
)
def test_resumed_run_may_keep_its_books_otherwise(tmp_path, root, group, key, value):
    config = root(name="x")
    begin(tmp_path, config)
    workdir.claim(tmp_path, change(config, **{group: {key: value}}))


def test_folder_is_for_one_process_at_a_time(tmp_path):
    """Through a file of its own, another process is refused, and told who is there."""
    folder = tmp_path / "run"
    with workdir.locked(folder):
        with (
            pytest.raises(
                ValueError, match=rf"run is in use by process {os.getpid()} on \S+; wait"
            ),
            workdir.locked(folder),
        ):
            raise AssertionError
        assert (folder / "lock").read_text().startswith("process ")
    with workdir.locked(folder):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "deepseek_v3"}', "holds a checkpoint, whose config"),
        ('{"family": "x", "model": {}}', "holds a checkpoint, whose config"),
        ("{", r"config\.json is not JSON.*; use another --workdir"),
    ],
)
def test_folder_of_a_checkpoint_is_left_alone(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message), workdir.locked(tmp_path):
        raise AssertionError
    assert (tmp_path / "config.json").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_file_is_no_folder_of_a_run(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match=r"run is no folder; name another --workdir"):
        with workdir.locked(tmp_path / "run"):
            pass
    assert (tmp_path / "run").read_text() == "mine"


def test_lock_ends_with_a_process_that_is_killed(tmp_path):
    code = "import sys, time, pathlib; from dsjax.train import workdir\n"
    code += "with workdir.locked(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        with (
            pytest.raises(ValueError, match=f"in use by process {process.pid} on"),
            workdir.locked(tmp_path),
        ):
            raise AssertionError
        process.kill()
    with workdir.locked(tmp_path):
        pass

"""Whole runs of a very small model: what they write, that they resume to the bit, and how they
fail.
"""

import dataclasses
import functools
import io
import json
import math
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from dsjax import settings
from dsjax.checkpoint import store
from dsjax.config import Config, DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
from dsjax.data.loader import Loader
from dsjax.files import read_json
from dsjax.parallel.mesh import make_mesh
from dsjax.train import hyperparameters, pretraining
from dsjax.train.evaluate import Evaluation
from dsjax.train.initial import open_initial
from dsjax.train.optimizer import adamw
from dsjax.train.step import abstract_state, declared_model
from dsjax.train.throughput import TIMED

MODEL = ModelConfig(
    vocab_size=300,
    dim=16,
    n_layers=1,
    n_heads=2,
    inter_dim=32,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    n_shared_experts=1,
    n_activated_experts=2,
    moe_inter_dim=8,
    router_bias=True,
    norm_topk=True,
    n_mtp=1,
    max_seq_len=16,
    init_std=0.05,
)
LINE_KEYS = set(
    "step tokens loss mtp_loss balance_loss grad_norm learning_rate tokens_per_second "
    "step_seconds mfu max_violation dropped_tokens skipped_steps data_seconds wall_seconds "
    "memory_bytes epoch".split()
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of 6 steps of two micro-batches, evaluated after steps 2 and 4, saved after 3 and 6."""
    root = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["attention", "latent", "expert", "router", "token", "balance", "of", "the", "a", "is"]
    for number in range(40):
        (root / f"{number}.txt").write_text(" ".join(rng.choice(words, size=80)))
    return Config(
        name="small",
        model=MODEL,
        data=DataConfig(
            files=f"{root}/*.txt",
            heldout_fraction=0.2,
            sequence_length=16,
            cache_dir=str(root / "cache"),
        ),
        train=TrainConfig(
            steps=6,
            batch_size=8,
            micro_batch_size=4,
            log_every=2,
            eval_every=2,
            eval_sequences=6,
            checkpoint_every=3,
            sample_tokens=4,
            tensorboard=False,
        ),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2, moment_dtype="bfloat16"),
        precision=PrecisionConfig(compute="float32"),
    )


@pytest.fixture(scope="module", autouse=True)
def cheap_programs(tmp_path_factory):
    """One device, few optimizations; each program traced and compiled once for all runs below."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "make_mesh", functools.partial(make_mesh, n_devices=1))
        for name in ("declared_model", "adamw", "pretraining", "train_step", "scorer"):
            patch.setattr(pretraining, name, functools.cache(getattr(pretraining, name)))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def change(config, **groups):
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in groups.items()
        },
    )


def run(config, folder):
    output = io.StringIO()
    code = pretraining.train(
        config, folder, command="python tools/train.py", console=Console(file=output, width=150)
    )
    return code, output.getvalue()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    return [
        {key: value for key, value in line.items() if key not in TIMED} for line in lines(folder)
    ]


def checkpoint(config, folder, step):
    """Names and bytes of every array of a checkpoint, and its place in the data."""
    declared = declared_model(config.model, config.precision)
    abstract = abstract_state(declared, adamw(config.optim), make_mesh({}, n_devices=1))
    state = store.restore(folder / "checkpoints", step, abstract)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {
        jax.tree_util.keystr(path): (leaf.dtype.name, np.asarray(leaf).tobytes())
        for path, leaf in leaves
    }
    return arrays, store.read_record(folder / "checkpoints", step)["data"]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, output = run(small, folder)
    assert code == 0
    return folder, output


def test_run_writes_its_files(finished):
    folder, output = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "versions.json", "metrics.jsonl", "summary.json", "loss.png",
        "expert_load.png", "expert_load.npz", "checkpoints", "tokenizer.json",
        "tokenizer_config.json", "report.md", "sessions.jsonl",
    }  # fmt: skip
    with np.load(folder / "expert_load.npz") as load:  # of the steps after the checkpoint of step 3
        assert load["last_step"] == 6 and load["steps"] == 3
        np.testing.assert_allclose(load["load_LE"].sum(axis=1), 1.0, rtol=1e-6)
    assert store.steps(folder / "checkpoints") == [3, 6]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tokens"] == 16 * 8 * 6 and summary["dropped_tokens"] == 0
    assert summary["loss"] < 5.6 and summary["compile_seconds"] > 0 and 0 < summary["mfu"] < 1
    assert summary["sample"]["completion"]
    report = (folder / "report.md").read_text()
    assert "Finished after 6 steps." in report and f"{summary['eval_loss']:.6g}" in report
    assert "(loss.png)" in report and "(expert_load.png)" in report
    for part in (
        "activated per token",
        "compiling the training step",
        "held-out bits per byte",
        "gzip",
        "xz",
    ):
        assert part in output


def test_slow_compute_type_is_said_at_the_start(small, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "advice", lambda compute, target: f"{target.kind}: {compute}")
    code, output = run(change(small, train={"steps": 1}), tmp_path)
    assert code == 0 and "cpu: float32" in output


def test_metrics_lines_have_the_promised_keys(finished):
    folder, _ = finished
    logged = [line for line in lines(folder) if "loss" in line]
    evaluations = [line for line in lines(folder) if "loss" not in line]
    assert [line["step"] for line in logged] == [1, 2, 4, 6]
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    assert all(line.keys() == LINE_KEYS for line in logged)
    assert all(
        line.keys() == {"step", "tokens", "eval_loss", "bits_per_byte"} for line in evaluations
    )
    assert all(np.isfinite(list(line.values())).all() for line in lines(folder))
    epochs, waits = ([line[name] for line in logged] for name in ("epoch", "data_seconds"))
    assert 0 < epochs[0] < epochs[1] < epochs[2] < epochs[3] == pytest.approx(6 * epochs[0])
    # A step's wait counts for the one that runs meanwhile, so the last before a pause has none.
    assert waits[0] > 0
    assert all(0 <= wait < line["step_seconds"] for wait, line in zip(waits, logged, strict=True))
    assert all(line["memory_bytes"] > 1e7 for line in logged)
    walls = [line["wall_seconds"] for line in logged]
    assert walls == sorted(walls) and walls[0] > 0


def test_logged_knobs_are_those_of_the_schedule(small, finished):
    logged = [line for line in lines(finished[0]) if "loss" in line]
    for line in logged:
        assert (
            line["learning_rate"] == hyperparameters.knobs(small, line["step"] - 1)["learning_rate"]
        )
        sequences = hyperparameters.sequences_before(small.train, line["step"])
        assert line["tokens"] == sequences * small.data.sequence_length


def test_same_command_on_a_finished_run_does_nothing(small, finished):
    folder, _ = finished
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*.*")
        if path.name not in ("config.json", "versions.json")
    }
    code, output = run(small, folder)
    assert code == 0 and "is finished" in output
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.heavy
def test_same_seed_twice_is_identical(small, finished, tmp_path):
    """Other bookkeeping is no other run: here nothing is evaluated or saved on the way."""
    code, _ = run(change(small, train={"eval_every": 0, "checkpoint_every": 0}), tmp_path)
    assert code == 0 and store.steps(tmp_path / "checkpoints") == [6]
    same = [line for line in untimed(finished[0]) if "loss" in line or line["step"] == 6]
    assert untimed(tmp_path) == same
    assert checkpoint(small, tmp_path, 6) == checkpoint(small, finished[0], 6)


def signal_in(patch, owner, name, call):
    """Sends SIGTERM to this process in the call of this number."""
    real, calls = getattr(owner, name), []

    def hooked(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # until the thread that watches for signals has seen it
        return real(*arguments, **keywords)

    patch.setattr(owner, name, hooked)


def test_run_stopped_anywhere_and_resumed_is_identical(small, finished, tmp_path, capfd):
    """While it waits for data, while it saves, and while it evaluates at the end."""
    folder = tmp_path / "run"
    for owner, name, call in (
        (Loader, "take", 2),
        (store.Store, "save", 1),
        (pretraining, "evaluate", 1),
    ):
        with pytest.MonkeyPatch.context() as patch:
            signal_in(patch, owner, name, call)
            code, output = run(small, folder)
        assert code == 143 and "to resume: python tools/train.py" in output, name
        assert "SIGTERM received: finishing this step, then saving" in capfd.readouterr().err
        step = store.latest(folder / "checkpoints")
        assert step and f"saved after step {step};" in output
        assert not (folder / "summary.json").exists()
        if step < 5:
            with (folder / "metrics.jsonl").open("a") as stream:
                stream.write(json.dumps({"step": 5, "loss": 0.0}) + "\n")  # a crash undid it
    code, output = run(small, folder)
    assert code == 0 and f"after step {step} of 6" in output
    assert untimed(folder) == untimed(finished[0])
    assert checkpoint(small, folder, 6) == checkpoint(small, finished[0], 6)


def test_run_whose_last_evaluation_was_cut_short_gets_it(small, finished, tmp_path):
    folder, _ = finished
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "summary.json").unlink()
    kept = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]
    (cut / "metrics.jsonl").write_text("".join(kept))
    code, _ = run(small, cut)
    assert code == 0 and untimed(cut) == untimed(folder)
    for key in (
        "tokens_per_second",
        "median_step_seconds",
        "mfu",
        "data_seconds",
    ):  # of the steps before
        summaries = [json.loads((run / "summary.json").read_text()) for run in (cut, folder)]
        assert summaries[0][key] == summaries[1][key] > 0


@pytest.mark.heavy
def test_run_goes_on_when_the_checkpoint_that_it_began_with_is_gone(small, finished, tmp_path):
    """With its own checkpoint and its own copy of the tokenizer, whether the config is given again
    or read from its folder.
    """
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(finished[0], base)
    config = dataclasses.replace(small, init=str(base))
    assert run(config, folder)[0] == 0
    before = untimed(folder)
    base.rename(tmp_path / "moved")
    shutil.rmtree(folder / "checkpoints" / "6")
    (folder / "summary.json").unlink()
    kept = settings.load_config(folder)
    assert kept.data.tokenizer == str(base / "tokenizer.json")
    assert open_initial(kept, folder) == open_initial(config, folder) == (kept, None)
    code, output = run(config, folder)
    assert code == 0 and "after step 3 of 6" in output and untimed(folder) == before
    with pytest.raises(ValueError, match=r"base does not exist; name the folder"):
        run(config, tmp_path / "new")


@pytest.mark.heavy
def test_last_evaluation_that_is_not_finite_is_null_and_made_once(
    small, finished, tmp_path, monkeypatch
):
    """Twice the run is finished again, as after a crash before summary.json was written."""
    folder, _ = finished
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    kept = lines(broken)[:-1]
    (broken / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    nowhere = Evaluation(math.nan, math.inf, (math.nan,))
    monkeypatch.setattr(pretraining, "evaluate", lambda *_, **__: nowhere)
    for _ in range(2):
        (broken / "summary.json").unlink()
        code, output = run(small, broken)
        assert code == 0 and "nan nats per token" in output
        *before, last = lines(broken)
        assert before == kept and last["eval_loss"] is last["bits_per_byte"] is None
        assert read_json(broken / "summary.json")["eval_loss"] is None


@pytest.mark.heavy
def test_batch_ramp_changes_the_batch_under_way(small, tmp_path):
    """4, 4, 8, 8 sequences a step, on a dense model, whose two programs are soon compiled."""
    dense = ModelConfig(
        vocab_size=300,
        dim=16,
        n_layers=1,
        n_heads=2,
        n_dense_layers=1,
        inter_dim=32,
        attention="gqa",
        max_seq_len=16,
    )
    ramp = {
        "steps": 4,
        "batch_size_start": 4,
        "batch_ramp_fraction": 0.5,
        "log_every": 1,
        "eval_every": 0,
    }
    ramped = dataclasses.replace(change(small, train={**ramp, "sample_tokens": 0}), model=dense)
    run(ramped, tmp_path)
    assert [line["tokens"] for line in lines(tmp_path) if "loss" in line] == [64, 128, 256, 384]
    assert store.read_record(tmp_path / "checkpoints", 4)["data"]["next_row"] == 24
    assert not list(tmp_path.glob("expert_load.*"))


def poison(patch, *steps):
    """Makes the gradient of some steps (counted from 1) NaN."""
    knobs = hyperparameters.knobs
    patch.setattr(
        hyperparameters,
        "knobs",
        lambda config, index: (
            knobs(config, index) | ({"mtp_weight": math.nan} if index + 1 in steps else {})
        ),
    )


def test_step_that_is_not_finite_is_skipped_and_written_down(small, tmp_path, monkeypatch):
    """Step 3 would be saved; its state is that of step 2."""
    poison(monkeypatch, 3)
    code, output = run(small, tmp_path)
    assert code == 0 and "step 3: loss is 5." in output
    assert "grad_norm nan; skipped, the model is unchanged (rows 16 to 23 of the data" in output
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["skipped_steps"] for line in logged] == [0, 0, 1, 1]
    (fault,) = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert (fault["step"], fault["kind"], fault["rows"]) == (3, "skipped", [16, 24])
    assert fault["grad_norm"] == "nan"
    assert store.steps(tmp_path / "checkpoints") == [6]
    assert json.loads((tmp_path / "summary.json").read_text())["skipped_steps"] == 1
    assert store.read_record(tmp_path / "checkpoints", 6)["skipped_steps"] == 1


@pytest.mark.heavy
def test_run_stops_when_no_step_is_finite_any_more(small, tmp_path):
    """A rate of 1e38 gives weights that overflow in the second step and in all after it."""
    wild = change(
        small,
        optim={"learning_rate": 1e38, "warmup_steps": 0},
        train={"checkpoint_every": 1, "keep": 9, "steps": 9},
    )
    with pytest.raises(
        ValueError, match=r"step 6: loss is .* in the 4 steps before it.*Try a lower"
    ):
        run(wild, tmp_path)
    assert "nan" not in (tmp_path / "metrics.jsonl").read_text().lower()
    assert store.steps(tmp_path / "checkpoints") == [1]
    assert len((tmp_path / "faults.jsonl").read_text().splitlines()) == 5


def test_workdir_of_another_config_is_refused(small, finished):
    with pytest.raises(
        ValueError, match=r"optim\.learning_rate was 0\.01 and is now 0\.02.*Use another --workdir"
    ):
        run(change(small, optim={"learning_rate": 0.02}), finished[0])

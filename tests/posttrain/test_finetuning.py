"""Whole fine-tuning runs of a small checkpoint: what they write, that they resume to the bit, that
the result is a checkpoint like any other, and how they fail.
"""

import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from rich.console import Console

import dsjax
from dsjax.checkpoint import store
from dsjax.checkpoint.load import open_checkpoint
from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.finetuning import EsftConfig, FineTuning, SftConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.data.loader import Loader
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain import finetuning
from dsjax.posttrain.initial import open_initial
from dsjax.text.chat import Message
from dsjax.train import step as steps
from dsjax.train.throughput import TIMED
from tests.checkpoint.conversions import send_out
from tests.posttrain.toy import END_THINK, write_hf, write_lines

pytestmark = pytest.mark.heavy

NARROW = {"num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
          "topk_group": 1, "rope_scaling": None}  # fmt: skip


def talks(count):
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i} + {i}?"},
                {"role": "assistant", "content": f"<think>\ntwice {i}</think>{2 * i}"},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of 6 steps, evaluated after steps 2 and 4, saved after 3 and 6."""
    root = tmp_path_factory.mktemp("tuning")
    base = write_hf(root / "base", "V3", **NARROW)
    files = write_lines(root / "talks.jsonl", talks(40))
    return FineTuning(
        name="small",
        init=str(base),
        sft=SftConfig(files=str(files), heldout_fraction=0.2, sequence_length=48, seed=3),
        train=TuningConfig(
            steps=6, batch_size=4, micro_batch_size=2, log_every=2, eval_every=2,
            checkpoint_every=3, sample_tokens=4, tensorboard=False, remat="none",
        ),
        optim=OptimConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=1),
        precision=PrecisionConfig(compute="float32"),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "make_mesh", functools.partial(make_mesh, n_devices=1))
        yield


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
    console = Console(file=output, width=150)
    code = finetuning.train(config, folder, command="python tools/sft.py", console=console)
    return code, output.getvalue()


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found]


def arrays(config, folder, number):
    """Bytes of every array of a checkpoint."""
    initial = open_initial(config.init)
    declared = steps.declared_model(initial.model, config.precision)
    optimizer = finetuning.adamw(config.optim, finetuning.all_but_mtp)
    abstract = steps.abstract_state(declared, optimizer, make_mesh({}, n_devices=1))
    state = store.restore(folder / "checkpoints", number, abstract)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, output = run(small, folder)
    assert code == 0, output
    return folder, output


def test_run_writes_its_files(finished):
    folder, output = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "versions.json", "metrics.jsonl", "summary.json", "loss.png", "checkpoints",
        "hf", "expert_load.npz", "expert_load.png",
    }  # fmt: skip
    assert {path.name for path in (folder / "hf").iterdir()} == {"config.json", "tokenizer.json"}
    assert store.steps(folder / "checkpoints") == [3, 6]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["tokens"] == 6 * 4 * 48
    assert summary["sample"]["prompt"].endswith("<think>\n") and summary["sample"]["completion"]
    assert 0 < summary["trained_share"] < 1 and summary["mtp_loss"] is None
    assert "32 conversations to train on" in output and "8 held out" in output
    assert "held-out loss" in output and "MTP" not in output


def test_loss_falls_and_held_out_conversations_are_scored(finished):
    logged = [line for line in lines(finished[0]) if "loss" in line]
    evaluated = [line for line in lines(finished[0]) if "eval_loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 4, 6]
    assert [line["step"] for line in evaluated] == [2, 4, 6]
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.5
    assert all(line["bits_per_byte"] > 0 for line in evaluated)
    rates = [line["learning_rate"] for line in logged]
    assert rates[0] == 1e-2 and rates[-1] < rates[-2]


def test_router_biases_rest(small, finished):
    before, after = (dsjax.load(path, dtype="float32") for path in (small.init, finished[0]))
    bias = [model.moe_layers.ffn.gate.bias[...] for model in (before, after)]
    np.testing.assert_array_equal(*bias)
    assert (before.head.weight[...] != after.head.weight[...]).any()


def test_result_is_a_checkpoint_like_any_other(finished, tmp_path):
    folder, _ = finished
    again = open_initial(folder)
    assert again.chat.name == "R1"
    assert again.chat.encode([Message("user", "1")])[-1] != END_THINK
    send_out(folder, tmp_path / "back", "float32")
    assert open_checkpoint(tmp_path / "back").model == again.model
    for got, want in zip(
        *(jax.tree.leaves(dsjax.load(p, dtype="float32")) for p in (tmp_path / "back", folder)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_interrupted_run_resumes_to_the_bit(small, finished, tmp_path, monkeypatch):
    """Also where the checkpoint that it began with is gone by then."""
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(small.init, base)
    config = dataclasses.replace(small, init=str(base))
    taken, take = [], Loader.take

    def interrupted(self, n):
        taken.append(n)
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # until the thread that watches for signals has seen it
        return take(self, n)

    monkeypatch.setattr(Loader, "take", interrupted)
    code, output = run(config, folder)
    assert code == 143 and "saved after step 5; to resume: python tools/sft.py" in output
    monkeypatch.setattr(Loader, "take", take)
    shutil.rmtree(base)
    code, output = run(config, folder)
    assert code == 0 and f"resuming {folder} after step 5 of 6" in output
    assert arrays(small, folder, 6) == arrays(small, finished[0], 6)
    assert [line for line in lines(folder) if "loss" in line][-1] == lines(finished[0])[-2]
    assert lines(folder)[-1] == lines(finished[0])[-1]
    code, output = run(config, folder)
    assert code == 0 and "is finished" in output


def test_next_run_begins_with_this_one(small, finished, tmp_path):
    second = change(
        dataclasses.replace(small, init=str(finished[0])),
        train={"steps": 1, "eval_every": 0},
        sft={"heldout_fraction": 0.0},
    )
    code, output = run(second, tmp_path / "second")
    assert code == 0 and "0 held out" in output and "held-out loss" not in output
    (first,) = [line["loss"] for line in lines(tmp_path / "second")]
    assert first < next(line for line in lines(finished[0]) if "loss" in line)["loss"] - 0.5
    assert json.loads((tmp_path / "second/summary.json").read_text())["eval_loss"] is None


def test_only_a_tasks_experts_train(small, tmp_path):
    config = dataclasses.replace(
        change(small, train={"eval_every": 0}),
        esft=EsftConfig(score="token", threshold=0.5, sample_rows=3),
    )
    code, output = run(config, tmp_path)
    assert code == 0 and "ESFT by token score" in output
    chosen = json.loads((tmp_path / "esft.json").read_text())["experts"]
    before, after = (dsjax.load(path, dtype="float32") for path in (small.init, tmp_path))
    np.testing.assert_array_equal(before.head.weight[...], after.head.weight[...])
    w = [model.moe_layers.ffn.experts.w_up[...] for model in (before, after)]
    moved = np.asarray((w[0] != w[1]).any(axis=(2, 3)))
    assert {int(e) for e in np.flatnonzero(moved[0])} <= set(chosen["1"])
    assert moved.any() and len(chosen["1"]) < 8


def test_resting_mtp_modules_count_no_operations(small, tmp_path, monkeypatch):
    def counted(model, length, **options):
        raise ZeroDivisionError(str(options))

    monkeypatch.setattr(finetuning, "train_flops_per_token", counted)
    with pytest.raises(ZeroDivisionError, match="'mtp': False"):
        run(small, tmp_path / "run")


def test_steps_follow_from_epochs(small):
    config = finetuning.with_steps(change(small, sft={"epochs": 2.5}), rows=9)
    assert config.train.steps == 6  # 22.5 rows in batches of 4
    assert finetuning.with_steps(small, rows=9) == small
    said, both = [], change(small, sft={"epochs": 2.5}, train={"steps": 77})
    assert finetuning.with_steps(both, 9, said.append) == config
    assert "train.steps=77 is not read; sft.epochs=0 leaves" in said[0]
    assert finetuning.with_steps(config, 9, said.append) == config and len(said) == 1


def test_tokenizer_of_another_release_changes_the_format(small, tmp_path):
    """A base model learns R1's format with the tokenizer of an R1 that has its vocabulary."""
    write_hf(tmp_path / "base", "V3", "base", **NARROW)
    plain = change(
        dataclasses.replace(small, init=str(tmp_path / "base")),
        train={"steps": 1, "eval_every": 0},
        sft={"format": "R1"},
    )
    with pytest.raises(
        ValueError, match=r"sft\.format=R1 needs the control tokens .*sft\.tokenizer"
    ):
        run(plain, tmp_path / "run")
    messages = change(plain, sft={"format": "checkpoint"})
    with pytest.raises(
        ValueError, match=r"talks\.jsonl:1: messages need a chat format, and this is"
    ):
        run(messages, tmp_path / "run")
    code, _ = run(change(plain, sft={"tokenizer": small.init}), tmp_path / "run")
    assert code == 0 and open_initial(tmp_path / "run").chat.name == "R1"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"sft": {"files": ""}}, r"sft\.files is empty; name the conversations"),
        ({"sft": {"files": "nowhere/*"}}, r"sft\.files='nowhere/\*' matches no file"),
        ({"sft": {"format": "V3"}}, r"sft\.format=V3: .* has the format R1, whose prompts are oth"),
        (
            {"sft": {"sequence_length": 512}},
            r"sft\.sequence_length=512 exceeds the checkpoint's ma",
        ),
        ({"sft": {"mtp": "on"}}, r"sft\.mtp=on, and the checkpoint has no MTP modules"),
        (
            {"sft": {"sequence_length": 8}},
            r"none of the 40 conversations .* 40 have more than the 9",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_run_is_refused_before_the_folder_is_made(small, tmp_path, groups, message):
    with pytest.raises(ValueError, match=message):
        run(change(small, **groups), tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Whole runs of a student with a teacher: beside it, or asked before, killed and taken up again."""

import dataclasses
import functools
import io
import json

import numpy as np
import pytest
from rich.console import Console

from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.distillation import DistillConfig
from dsjax.config.finetuning import FineTuning, SftConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain import finetuning, teaching
from tests.posttrain.signalling import signalled
from tests.posttrain.toy import write_hf, write_lines

pytestmark = pytest.mark.heavy

NARROW = {"num_hidden_layers": 2, "first_k_dense_replace": 1}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A student whose teacher is wider and of another release."""
    root = tmp_path_factory.mktemp("teaching")
    student = write_hf(root / "student", "V3", control="V3", **NARROW)
    teacher = write_hf(root / "teacher", "Qwen2", control="V3", hidden_size=48)
    talks = [{"prompt": f"{i}?", "completion": f"it is {2 * i}"} for i in range(60)]
    return FineTuning(
        name="taught",
        init=str(student),
        sft=SftConfig(
            files=str(write_lines(root / "talks.jsonl", talks)),
            heldout_fraction=0.1,
            sequence_length=64,
        ),
        distill=DistillConfig(kind="logits", teacher=str(teacher), temperature=2.0),
        train=TuningConfig(
            steps=16, batch_size=4, micro_batch_size=2, log_every=1, eval_every=0,
            checkpoint_every=8, sample_tokens=0, tensorboard=False, remat="none", loss_chunk=64,
        ),
        optim=OptimConfig(learning_rate=1e-2, schedule="constant", warmup_steps=1),
        precision=PrecisionConfig(compute="float32"),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "make_mesh", functools.partial(make_mesh, n_devices=1))
        yield


def change(config, **groups):
    changed = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in groups.items()
    }
    return dataclasses.replace(config, **changed)


def run(config, folder):
    output = io.StringIO()
    console = Console(file=output, width=150)
    assert finetuning.train(config, folder, command="python tools/sft.py", console=console) == 0
    return output.getvalue()


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def fingerprints(folder, step):
    manifest = json.loads((folder / f"checkpoints/{step}/manifest.json").read_text())
    return {name: leaf["fingerprint"] for name, leaf in manifest["leaves"].items()}


@pytest.fixture(scope="module")
def beside(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teaching") / "beside"
    run(small, folder)
    return folder


def test_a_student_comes_closer_to_its_teacher(beside):
    found = losses(beside)
    assert len(found) == 16 and found[-1] < 0.5 * found[0]
    summary = json.loads((beside / "summary.json").read_text())
    assert summary["eval_loss"] > 0 and summary["bits_per_byte"] > 0
    assert not (beside / "teacher").exists()


def test_a_teacher_asked_for_nearly_all_it_knows_teaches_the_same(small, beside, tmp_path):
    run(change(small, distill={"top_k": 271}, train={"steps": 3}), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(beside)[:3], rtol=1e-4)


def test_a_run_killed_while_its_teacher_is_asked_ends_the_same_to_the_bit(
    small, tmp_path, monkeypatch
):
    config = change(small, distill={"top_k": 8})
    run(config, tmp_path / "whole")
    monkeypatch.setattr(teaching, "_FLUSH_SECONDS", 0.0)
    place_all, calls = teaching.place_all, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return place_all(*arguments)

    monkeypatch.setattr(teaching, "place_all", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run")
    kept = tmp_path / "run/teacher/logp.npy"
    written = kept.stat().st_size
    assert 0 < written < (tmp_path / "whole/teacher/logp.npy").stat().st_size
    monkeypatch.setattr(teaching, "place_all", place_all)
    run(change(config, train={"steps": 8}), tmp_path / "run")
    for name in ("ids", "logp"):
        whole = (tmp_path / f"whole/teacher/{name}.npy").read_bytes()
        assert (tmp_path / f"run/teacher/{name}.npy").read_bytes() == whole
    at = kept.stat().st_mtime_ns
    run(config, tmp_path / "run")
    assert kept.stat().st_mtime_ns == at  # the teacher was not asked again
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert fingerprints(tmp_path / "run", 16) == fingerprints(tmp_path / "whole", 16)


def test_a_signal_stops_a_teacher_and_keeps_what_it_said(small, tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "place_all", signalled(teaching.place_all, 4, monkeypatch))
    output = io.StringIO()
    code = finetuning.train(
        change(small, distill={"top_k": 8}), tmp_path / "run", command="again",
        console=Console(file=output, width=150),
    )  # fmt: skip
    assert code == 143 and "stopped before the first step; to go on: again" in output.getvalue()
    size = (tmp_path / "run/teacher/ids.npy").stat().st_size
    assert size == 128 + 3 * 2 * 64 * 8 * 4  # a header, and three batches of two rows


def test_a_student_learns_on_its_own_answers_and_resumes_to_the_bit(small, tmp_path):
    config = change(small, distill={"kind": "on_policy", "max_new_tokens": 8})
    run(config, tmp_path / "whole")
    found = losses(tmp_path / "whole")
    assert np.mean(found[-3:]) < 0.8 * np.mean(found[:3])  # 0.70 after 16 steps
    run(change(config, train={"steps": 8}), tmp_path / "run")
    run(config, tmp_path / "run")
    assert losses(tmp_path / "run") == found
    assert fingerprints(tmp_path / "run", 16) == fingerprints(tmp_path / "whole", 16)


def test_a_teacher_of_another_vocabulary_is_refused(small, tmp_path):
    other = write_hf(tmp_path / "other", control="base")
    with pytest.raises(ValueError, match=r"another vocabulary.*tokenizers differ"):
        run(change(small, distill={"teacher": str(other)}), tmp_path / "run")

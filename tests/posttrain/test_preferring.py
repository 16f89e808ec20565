"""Whole runs of preference training on a very small model: what they learn, write and resume."""

import dataclasses
import functools
import io
import json
import math

import jax
import numpy as np
import pytest
from rich.console import Console

from dsjax.checkpoint import store
from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.preference import Preference, PreferenceConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain import preferring
from dsjax.posttrain.reward_model import load_reward_model
from dsjax.train.throughput import TIMED
from tests.posttrain.signalling import signalled
from tests.posttrain.toy import write_hf, write_lines

# One dense and one MoE layer: every mechanism, few seconds to compile.
NARROW = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}


def examples(count, seed=0, *, labelled=False):
    """A planted preference: answers with an a are good, those with a b bad, whatever was asked."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        good, bad = ("".join(rng.choice(list(letters), 6)) for letters in ("aaac", "bbbc"))
        prompt = f"{rng.integers(50):02d}"
        if labelled:
            label = bool(number % 2)
            found.append({"prompt": prompt, "completion": good if label else bad, "label": label})
        elif good != bad:
            found.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("preferring") / "hf", "V3", control="V3", **NARROW)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_lines(folder / "pairs.jsonl", examples(160))
    write_lines(folder / "labels.jsonl", examples(160, labelled=True))
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preferring, "make_mesh", functools.partial(make_mesh, n_devices=1))
        yield


def config(base, files, kind="dpo", steps=24, **train):
    name = "labels" if kind == "pointwise" else "pairs"
    return Preference(
        name="preferring",
        init=str(base),
        preference=PreferenceConfig(
            kind=kind, files=str(files / f"{name}.jsonl"), sequence_length=16, heldout_fraction=0.2
        ),
        train=TuningConfig(
            **{
                "steps": steps,
                "batch_size": 8,
                "micro_batch_size": 4,
                "log_every": 1,
                "eval_every": 8,
                "checkpoint_every": 8,
                "tensorboard": False,
                "loss_chunk": 64,
                "remat": "none",
                **train,
            }
        ),
        optim=OptimConfig(learning_rate=3e-3, schedule="constant", warmup_steps=2),
        precision=PrecisionConfig(compute="float32"),
    )


def run(config, folder):
    output = io.StringIO()
    code = preferring.train(
        config, folder, command="python tools/prefer.py", console=Console(file=output, width=150)
    )
    return code, output.getvalue()


def lines(folder):
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMED}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def leaves(folder, step):
    """Every file of a checkpoint's arrays, by content."""
    manifest = json.loads((folder / f"checkpoints/{step}/manifest.json").read_text())
    return {name: leaf["fingerprint"] for name, leaf in manifest["leaves"].items()}


@pytest.fixture(scope="module")
def preferred(base, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferring") / "dpo"
    code, printed = run(config(base, files), folder)
    assert code == 0
    return folder, printed


@pytest.mark.heavy
def test_dpo_learns_the_planted_preference(preferred):
    folder, printed = preferred
    first, *_ = lines(folder)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
    assert abs(first["margin"]) < 1e-4
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval_accuracy"] > 0.9 and summary["eval_loss"] < 0.4
    assert summary["kind"] == "dpo" and summary["epochs"] > 1
    assert "held-out accuracy" in printed and "pairs to train on" in printed
    held = [line for line in lines(folder) if "eval_accuracy" in line]
    assert len(held) == 3 and held[0]["eval_loss"] > held[-1]["eval_loss"]


@pytest.mark.heavy
def test_a_resumed_run_is_the_same_to_the_bit(preferred, base, files, tmp_path):
    """Killed in the reference's pass and after a checkpoint; the reference is not asked again."""
    whole, _ = preferred
    folder, wanted = tmp_path / "run", config(base, files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preferring, "_FLUSH_SECONDS", 0.0)
        calls = []

        def killed(*arguments):
            calls.append(arguments)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return place_all(*arguments)

        place_all = preferring.place_all
        patch.setattr(preferring, "place_all", killed)
        with pytest.raises(KeyboardInterrupt):
            run(wanted, folder)
    kept = folder / "reference/logp.npy"
    assert 0 < kept.stat().st_size < (whole / "reference/logp.npy").stat().st_size
    stopped = dataclasses.replace(wanted, train=dataclasses.replace(wanted.train, steps=16))
    run(stopped, folder)
    assert kept.read_bytes() == (whole / "reference/logp.npy").read_bytes()
    written = kept.stat().st_mtime_ns
    run(wanted, folder)
    assert kept.stat().st_mtime_ns == written
    assert leaves(folder, 24) == leaves(whole, 24)
    got = {line["step"]: line for line in lines(folder) if "loss" in line}
    assert got == {line["step"]: line for line in lines(whole) if "loss" in line}


@pytest.mark.heavy
def test_a_signal_stops_the_references_pass_and_keeps_what_it_said(
    preferred, base, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(preferring, "place_all", signalled(preferring.place_all, 4, monkeypatch))
    code, printed = run(config(base, files), tmp_path / "run")
    assert code == 143 and "stopped before the first step; to go on: python tools/pre" in printed
    kept, whole = (
        (folder / "reference/logp.npy").read_bytes() for folder in (tmp_path / "run", preferred[0])
    )
    assert whole.startswith(kept)
    assert len(kept) == 128 + 3 * 8 * 4  # a header, and three batches of eight rows


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["bradley_terry", "pointwise"])
def test_reward_models_learn_the_planted_preference(kind, base, files, tmp_path):
    code, _ = run(config(base, files, kind), tmp_path / "run")
    assert code == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["eval_accuracy"] > 0.9, summary
    scorer = load_reward_model(tmp_path / "run")
    encode = scorer.vocabulary.coder.encode
    good, bad = (
        scorer([0, 263, *encode("07"), 264, *encode(answer), 1]) for answer in ("aacaca", "bcbbbc")
    )
    assert good > bad and (kind != "pointwise" or good > 0 > bad)
    assert store.latest(tmp_path / "run/checkpoints") == 24
    assert not (tmp_path / "run/reference").exists()


@pytest.mark.slow
def test_a_run_on_eight_devices_is_the_same(preferred, base, files, tmp_path):
    wanted = config(base, files, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            preferring, "make_mesh", lambda sizes: make_mesh({"data": 2, "expert": 2, "fsdp": 2})
        )
        run(wanted, tmp_path / "run")
    got, want = lines(tmp_path / "run"), lines(preferred[0])
    reference = [
        np.load(folder / "reference/logp.npy") for folder in (tmp_path / "run", preferred[0])
    ]
    np.testing.assert_allclose(*reference, rtol=1e-5)
    for step in range(2):
        assert got[step]["loss"] == pytest.approx(want[step]["loss"], rel=1e-4)
        assert got[step]["grad_norm"] == pytest.approx(want[step]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"files": ""}, r"preference\.files is empty.*--set preference\.files="),
        ({"files": "nowhere/*.jsonl"}, r"preference\.files='nowhere/\*\.jsonl' matches no file"),
        ({"sequence_length": 4}, r"none of the 1\d\d examples.*raise it"),
        ({"sequence_length": 512}, r"exceeds the checkpoint's max_seq_len=256"),
    ],
    ids=["no files", "no match", "too short", "too long"],
)
def test_bad_settings_are_refused_before_the_folder_is_touched(
    changes, says, base, files, tmp_path
):
    wanted = config(base, files)
    wanted = dataclasses.replace(
        wanted, preference=dataclasses.replace(wanted.preference, **changes)
    )
    with pytest.raises(ValueError, match=says):
        run(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_refused(base, files, tmp_path):
    with pytest.raises(ValueError, match=r"train\.batch_size=512 is more than the \d+ pairs"):
        run(config(base, files, batch_size=512, micro_batch_size=0), tmp_path / "run")


def test_epochs_decide_the_steps():
    wanted = Preference(
        name="p", preference=PreferenceConfig(epochs=1.5), train=TuningConfig(batch_size=4)
    )
    assert preferring.with_steps(wanted, 10).train.steps == 4
    assert preferring.with_steps(wanted, 1).train.steps == 1
    said = []
    preferring.with_steps(wanted, 10, said.append)
    assert not said  # nobody asked for other steps
    asked = dataclasses.replace(wanted, train=TuningConfig(batch_size=4, steps=9))
    assert preferring.with_steps(asked, 10, said.append).train.steps == 4
    assert said == [
        "preference.epochs=1.5 makes 4 steps, and train.steps=9 is not read; "
        "preference.epochs=0 leaves the length to it"
    ]


def test_batches_are_filled_with_rows_that_count_nothing():
    batch = {"tokens": np.ones((2, 3), np.int32), "label": np.ones(2, np.float32)}
    filled = preferring._filled(batch, 4)
    assert jax.tree.map(np.shape, filled) == {"tokens": (4, 3), "label": (4,)}
    assert not filled["tokens"][2:].any() and not filled["label"][2:].any()

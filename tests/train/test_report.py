"""The files and the lines of a run's report."""

import dataclasses
import importlib
import json
import sys
import types

import pytest

from dsjax.config import Config, DataConfig, ModelConfig, TrainConfig
from dsjax.train import report

CONFIG = Config(
    name="report",
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
    train=TrainConfig(steps=8, tensorboard=False),
)
LINE = {
    "step": 4,
    "tokens": 128,
    "loss": 2.5,
    "mtp_loss": 2.75,
    "balance_loss": 1e-4,
    "grad_norm": 1.0,
    "learning_rate": 1e-3,
    "tokens_per_second": 4096.0,
    "step_seconds": 2.0,
    "mfu": 0.25,
    "max_violation": 0.5,
    "dropped_tokens": 0,
}


def test_metrics_drops_lines_after_the_resumed_step_and_half_lines(tmp_path):
    lines = [
        {"step": 2, "loss": 3.0},
        {"step": 4, "loss": 2.5},
        {"step": 4, "eval_loss": 2.4},
        {"step": 6, "loss": 2.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    metrics = report.Metrics(tmp_path, CONFIG, first_step=4)
    metrics.write({"step": 6, "loss": 2.0})
    assert metrics.lines() == lines
    metrics.close()


def test_number_that_is_not_finite_is_null_and_the_lines_of_older_versions_are_mended(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "eval_loss": NaN}\n')
    metrics = report.Metrics(tmp_path, CONFIG, first_step=2)
    metrics.write({"step": 4, "eval_loss": float("inf"), "bits_per_byte": 2.0})
    metrics.close()
    lines = metrics.path.read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 2, "eval_loss": None},
        {"step": 4, "eval_loss": None, "bits_per_byte": 2.0},
    ]


@pytest.mark.parametrize("end", ["", "\n", '\n{"step": 9, "te'])
def test_newest_line_is_found_at_the_end_of_a_file(tmp_path, monkeypatch, end):
    """Also where it is longer than what is read at first."""
    monkeypatch.setattr(report, "_TAIL", 16)
    path = tmp_path / "samples.jsonl"
    assert report.newest_line(path) is None
    path.write_text("")
    assert report.newest_line(path) is None
    lines = [{"step": step, "text": "x" * 50 * step} for step in (1, 2, 3)]
    for some in (lines[:1], lines):
        path.write_text("\n".join(map(json.dumps, some)) + end)
        assert report.newest_line(path) == some[-1]
    path.write_text('{"step": 9, "te')
    assert report.newest_line(path) is None


def test_metrics_writes_tensorboard(tmp_path):
    config = dataclasses.replace(CONFIG, train=TrainConfig(steps=8))
    metrics = report.Metrics(tmp_path, config, first_step=0)
    metrics.write(LINE)
    metrics.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"speed/mfu" in events.read_bytes()


def test_tensorboard_does_not_import_pytorch(tmp_path, monkeypatch):
    """tensorboardX does where it can, and no tensor of PyTorch is ever logged."""
    asked = []

    def imported(name):
        with pytest.raises(ModuleNotFoundError, match="torch"):
            importlib.import_module("torch")
        asked.append(name)
        return lambda *_, **__: types.SimpleNamespace(close=lambda: None)

    fake = types.ModuleType("tensorboardX")
    monkeypatch.setattr(fake, "__getattr__", imported, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    config = dataclasses.replace(CONFIG, train=TrainConfig(steps=8))
    report.Metrics(tmp_path, config, first_step=0).close()
    assert "SummaryWriter" in asked and "torch" not in sys.modules


def test_line_is_described_in_short_and_in_full():
    assert report.described(LINE) == (
        "loss 2.5000  4,096 tokens/s",
        "loss 2.5000  mtp 2.7500  grad_norm 1.000  lr 0.001  max_violation 0.50  "
        "4,096 tokens/s  mfu 25.0%",
    )


def test_metrics_says_how_to_get_wandb(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(report.importlib, "import_module", missing)
    config = dataclasses.replace(CONFIG, train=TrainConfig(tensorboard=False, wandb_project="deep"))
    with pytest.raises(
        ValueError, match=r"train\.wandb_project=deep needs the package wandb; install it"
    ):
        report.Metrics(tmp_path, config, first_step=0)


def test_mtp_loss_is_shown_only_where_modules_train():
    assert "mtp" in report.described(LINE)[1]
    assert "mtp" not in report.described(LINE | {"mtp_loss": 0.0})[1]


def test_rewards_are_shown_in_place_of_a_loss_that_says_nothing():
    line = LINE | {"reward": 0.25, "right": 0.125, "rollout_seconds": 1.5, "update_seconds": 0.25}
    short, full = report.described(line)
    assert short == "reward 0.250  right 12.5%  4,096 tokens/s"
    assert "seconds: rollout 1.50  update 0.25" in full and "loss" not in full

"""Tiny learns: the promises of its docstring, at its real size. Minutes, so marked slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsjax.config import Config
from dsjax.data.corpus import prepare_corpus
from dsjax.settings import load_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def _train(folder, *overrides):
    """Trains as a user does, without the tests' flags; returns logged lines and summary."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("XLA", "JAX"))}
    command = [sys.executable, "tools/train.py", "--workdir", str(folder)]
    command += ["--set", "train.keep=1", *overrides]
    subprocess.run(command, cwd=ROOT, env=plain | {"JAX_PLATFORMS": "cpu"}, check=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return [line for line in lines if "loss" in line], summary


def _unigram_loss(config: Config) -> float:
    """Nats a token of a model that knows only how often each token occurs."""
    corpus = prepare_corpus(
        files="",
        heldout_files="",
        heldout_fraction=config.data.heldout_fraction,
        text_field="text",
        tokenizer_path="",
        vocab_size=config.model.vocab_size,
        cache_dir="",
        progress=None,
    )
    counts = np.bincount(np.concatenate([corpus.train[i] for i in range(len(corpus.train))]))
    share = counts[counts > 0] / counts.sum()
    return -(share * np.log(share)).sum()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("tiny"))


def test_tiny_beats_gzip_on_held_out_text(whole_run):
    _, summary = whole_run
    assert summary["bits_per_byte"] < summary["gzip_bits_per_byte"]
    assert summary["dropped_tokens"] == 0


def test_mtp_loss_falls_below_the_unigram_distribution(whole_run):
    lines, _ = whole_run
    config = load_config(ROOT / "configs" / "tiny.py")
    assert np.mean([line["mtp_loss"] for line in lines[-5:]]) < _unigram_loss(config)


def test_bias_update_evens_the_load(whole_run, tmp_path):
    """Without it, and without the sequence-wise loss, a few experts keep most tokens."""
    lines, _ = whole_run
    off = ["train.bias_update_speed=0", "train.sequence_balance=0", "train.steps=300"]
    unbalanced, _ = _train(tmp_path, *off)
    balanced = [line["max_violation"] for line in lines]
    assert np.mean(balanced[-5:]) < max(balanced) / 3
    assert np.mean([line["max_violation"] for line in unbalanced[-5:]]) > 3 * np.mean(balanced[-5:])

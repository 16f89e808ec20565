"""tools/score.py as a user runs it, on a checkpoint as Hugging Face publishes it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dsjax import load
from dsjax.text.tokenizer import load_tokenizer, train_tokenizer
from tests.checkpoint import hf_files
from tests.closeness import F32, assert_close
from tests.golden.cases import V3, Case

ROOT = Path(__file__).parents[1]
VOCABULARY = 300
CONFIG = V3 | {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
}
TEXT = "Some text to score, with \u00fcmlauts; some more text.\n" * 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score") / "checkpoint"
    hf_files.write(folder, CONFIG, hf_files.plain(Case(CONFIG, seed=5)))
    train_tokenizer([TEXT] * 3, vocab_size=VOCABULARY).save(str(folder))
    return folder


def run(*arguments):
    return subprocess.run(
        [sys.executable, "tools/score.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.heavy
def test_score_of_a_text_is_that_of_its_tokens(checkpoint, tmp_path):
    """Bits a byte of the file follow from the logits of its tokens, which another run writes."""
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = load_tokenizer(str(checkpoint))
    ids = np.array([[tokenizer.special.bos, *tokenizer.encode(TEXT)]])
    np.save(tmp_path / "T.npy", ids)
    scored = run(checkpoint, "--text", tmp_path / "*.txt", "--json")
    assert scored.returncode == 0, scored.stderr
    figures = json.loads(scored.stdout)
    assert figures["bytes"] == len(TEXT.encode()) and figures["tokens"] == ids.size - 1

    outputs = ["--logits", tmp_path / "L.npy", "--mtp-logits", tmp_path / "M.npy"]
    written = run(checkpoint, "--tokens", tmp_path / "T.npy", *outputs, "--mesh", "data=2")
    assert written.returncode == 0, written.stderr
    logits, mtp_logits = np.load(tmp_path / "L.npy"), np.load(tmp_path / "M.npy")
    assert logits.shape == (1, ids.size, VOCABULARY) and logits.dtype == np.float32
    assert mtp_logits.shape == (1, ids.size - 1, VOCABULARY)
    logits = logits.astype(np.float64)[0, :-1]
    normalizer = np.log(np.exp(logits).sum(axis=-1))
    nats = (normalizer - np.take_along_axis(logits, ids[0, 1:, None], axis=-1)[:, 0]).sum()
    assert_close(figures["loss"], nats / figures["tokens"], F32, "loss")
    assert_close(figures["bits_per_byte"], nats / math.log(2) / figures["bytes"], F32, "bits")
    assert f"loss          {figures['loss']:.4f}\n" in written.stdout
    loaded = jax.jit(load(checkpoint))(ids)
    assert_close(np.asarray(loaded)[0, :-1], logits, F32, "logits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "T.npy", "--text", "a.txt"], "not allowed with argument"),
        ([], "one of the arguments --text --tokens is required"),
        (["--text", "a.txt", "--logits", "L.npy"], "--mtp-logits go with --tokens"),
        (["--text", "a.txt", "--image", "a.png"], "--high-pixels go with --tokens"),
        (["--tokens", "T.npy", "--sequence-length", "5"], "and --no-bos go with --text"),
        (["--tokens", "T.npy", "--image", "a.png", "--pixels", "P.npy"], "not allowed with"),
        (["--tokens", "T.npy", "--high-pixels", "H.npy"], "--high-pixels goes with --pixels"),
    ],
)
def test_score_refuses_wrong_usage(arguments, message):
    done = run("checkpoint", *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_score_of_no_checkpoint_is_one_message(tmp_path):
    done = run(tmp_path / "absent", "--text", "README.md")
    assert done.returncode == 1 and "absent does not exist" in done.stderr
    assert "Traceback" not in done.stderr

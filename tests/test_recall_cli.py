"""tools/recall.py as a user runs it, on a checkpoint as Hugging Face publishes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsjax.text.tokenizer import train_tokenizer
from tests.checkpoint import hf_files
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
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall") / "checkpoint"
    hf_files.write(folder, CONFIG, hf_files.plain(Case(CONFIG, seed=5)))
    train_tokenizer(["The secret number of a name.\n"] * 3, vocab_size=VOCABULARY).save(str(folder))
    return folder


def run(*arguments):
    return subprocess.run(
        [sys.executable, "tools/recall.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", [pytest.param("needle", marks=pytest.mark.slow), "tokens"])
def test_figures_and_heat_map_of_a_model_that_knows_nothing(task, checkpoint, tmp_path):
    found = run(
        checkpoint, "--task", task, "--lengths", "512,700", "--depths", 2, "--n", 3, "--max-batch",
        2, "--json", tmp_path / "recall.json", "--png", tmp_path / "recall.png",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "questions: 100%" in found.stderr and "95 % interval" in found.stdout
    figures = json.loads((tmp_path / "recall.json").read_text())
    assert figures["lengths"] == [512, 700] and figures["depths"] == [0.0, 1.0]
    assert figures["recall"] == [0.0, 0.0] and figures["recall_by_depth"] == [[0.0] * 2] * 2
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.heavy
def test_length_beyond_the_model_is_one_message(checkpoint):
    found = run(checkpoint, "--lengths", 2048)
    assert found.returncode == 1 and not found.stdout
    (line,) = found.stderr.splitlines()
    assert "--lengths 2048 is not between 1 and the model's limit of 1024" in line


@pytest.mark.parametrize("lengths", ["4k", "", "1024,,"])
def test_lengths_are_numbers(lengths):
    found = run("model", "--lengths", lengths)
    assert found.returncode == 2 and "is not a list of lengths" in found.stderr

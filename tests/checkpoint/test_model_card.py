"""The README.md of an export."""

import json

import pytest

from dsjax.checkpoint.load import open_checkpoint
from dsjax.checkpoint.model_card import model_card
from tests.checkpoint.conversions import send_out
from tests.checkpoint.runs import write_run
from tests.golden.cases import ORACLE_CASES

MTP = ORACLE_CASES["v3_mtp"]


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", MTP, 3)
    return tmp_path / "run"


def test_card_has_the_models_facts_and_how_to_use_it(run):
    checkpoint = open_checkpoint(run)
    card = model_card(checkpoint, "tiny", "bfloat16")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:")
    assert f"- {checkpoint.family}\n---\n\n# tiny\n" in card
    model = checkpoint.model
    for label, value in (
        ("layers", model.n_layers), ("vocabulary", model.vocab_size), ("weights", "bfloat16")
    ):  # fmt: skip
        assert f"| {label} | {value} |" in card
    assert "multi-token prediction" in card and 'dsjax.load("tiny")' in card
    assert "## Training" not in card


def test_card_has_the_facts_of_a_finished_run(run):
    summary = {"steps": 1200, "tokens": 99_000, "eval_loss": 2.5, "bits_per_byte": None}
    (run / "summary.json").write_text(json.dumps(summary))
    card = model_card(open_checkpoint(run), "tiny", "bfloat16")
    assert "| optimizer steps | 1,200 |\n| training tokens | 99,000 |" in card
    assert "| held-out loss, nats per token | 2.5000 |" in card and "bits per byte" not in card


def test_export_has_a_card(run, tmp_path):
    send_out(run, tmp_path / "mine", "float32")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "# mine\n" in card and "| weights | float32 |" in card

"""The text of a run: a mixture by weight, and what is said of a corpus."""

import io
import json

import pytest
from rich.console import Console

from dsjax.config import Config, DataConfig, ModelConfig
from dsjax.data.mixture import MixedRows
from dsjax.data.packing import PackedSequences
from dsjax.train import text

MODEL = ModelConfig(
    vocab_size=300, dim=16, n_layers=1, n_heads=2, n_dense_layers=1, inter_dim=32, attention="gqa",
    max_seq_len=8,
)  # fmt: skip


@pytest.fixture
def config(tmp_path):
    for name, count in (("a", 20), ("b", 60)):
        lines = [
            json.dumps({"text": f"{name} says {number} again " * 5}) for number in range(count)
        ]
        lines += [lines[0], "broken"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def make(**data):
        given = {
            "cache_dir": str(tmp_path / "cache"),
            "sequence_length": 8,
            "on_bad_record": "skip",
        }
        files = f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
        return Config(name="x", model=MODEL, data=DataConfig(files=files, **given | data))

    return make


def shown(config):
    corpus = text.corpus_of(config)
    rows, output = text.training_rows(config, corpus), io.StringIO()
    text.show(Console(file=output, width=160), config, corpus, rows, 1000)
    return rows, output.getvalue()


def test_text_without_weights_is_read_document_by_document(config):
    rows, said = shown(config())
    assert isinstance(rows, PackedSequences) and "mixture" not in said
    assert "2 documents are copies of others\n" in said
    assert "2 records or files could not be read: see rejected.jsonl" in said


def test_mixture_has_the_shares_of_the_weights(config):
    rows, said = shown(config(weights=(3.0, 1.0)))
    assert isinstance(rows, MixedRows) and rows.counts(1000) == [750, 250]
    assert "a.jsonl" in said and "75.0%" in said and "750" in said
    assert rows.parts[0].epochs(750) > 3 * rows.parts[1].epochs(250)
    assert f"{rows.parts[0].epochs(750):.2f}" in said


def test_weights_are_one_for_each_glob(config):
    with pytest.raises(
        ValueError, match=r"data\.weights has 3 numbers .* 2 globs; give one weight"
    ):
        shown(config(weights=(3.0, 1.0, 1.0)))

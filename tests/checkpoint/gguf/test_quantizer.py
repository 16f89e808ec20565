"""The run of llama.cpp's quantizer, with a program in its place that records what it was told."""

import sys

import pytest
from gguf import GGMLQuantizationType as Kind

from dsjax.checkpoint.gguf import quantizer
from tests.checkpoint.conversions import quiet

TYPES = {"a.weight": Kind.Q2_K, "b.weight": Kind.Q8_0, "c.weight": Kind.Q2_K}


def place(folder, monkeypatch, body):
    program = folder / "llama-quantize"
    program.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_program_is_needed_for_its_types_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert quantizer.find({"b.weight": Kind.Q8_0}) is None
    with pytest.raises(ValueError, match=r"Q2_K are made by llama\.cpp's llama-quantize.*Install"):
        quantizer.find(TYPES)
    place(tmp_path, monkeypatch, "")
    assert quantizer.find(TYPES) == str(tmp_path / "llama-quantize")


def test_program_is_told_the_type_of_every_tensor(monkeypatch, tmp_path):
    body = (
        "rules = pathlib.Path(sys.argv[2]).read_text()\n"
        "pathlib.Path(sys.argv[4]).write_text(rules + sys.argv[5])"
    )
    place(tmp_path, monkeypatch, body)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"weights")
    made = quantizer.run(str(tmp_path / "llama-quantize"), file, TYPES, quiet())
    assert made.read_text() == ("^a\\.weight$=q2_k\n^b\\.weight$=q8_0\n^c\\.weight$=q2_k\nQ2_K")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-quantize", made.name]


def test_failure_shows_what_the_program_said(monkeypatch, tmp_path):
    place(tmp_path, monkeypatch, "print('out of luck'); sys.exit(3)")
    file = tmp_path / "m.gguf"
    file.write_bytes(b"weights")
    with pytest.raises(ValueError, match="exit code 3: out of luck"):
        quantizer.run(str(tmp_path / "llama-quantize"), file, TYPES, quiet())

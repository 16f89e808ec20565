"""The run of llama.cpp's quantizer, with a program in its place that records what it was told."""

import sys

import gguf
import numpy as np
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


def write_file(path, types):
    """A GGUF file with a tensor of each type."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, kind in types.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor(name, np.zeros((2, 256 // block * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


COPIES = (
    "folder = pathlib.Path(sys.argv[0]).parent\n"
    "(folder / 'told').write_text(pathlib.Path(sys.argv[2]).read_text() + sys.argv[5])\n"
    "pathlib.Path(sys.argv[4]).write_bytes((folder / 'result').read_bytes())"
)


def test_program_is_told_the_type_of_every_tensor(monkeypatch, tmp_path):
    place(tmp_path, monkeypatch, COPIES)
    write_file(tmp_path / "result", TYPES)
    file = write_file(tmp_path / "m.gguf", dict.fromkeys(TYPES, Kind.Q8_0))
    made = quantizer.run(str(tmp_path / "llama-quantize"), file, TYPES, quiet())
    assert made.read_bytes() == (tmp_path / "result").read_bytes()
    assert (tmp_path / "told").read_text() == (
        "^a\\.weight$=q2_k\n^b\\.weight$=q8_0\n^c\\.weight$=q2_k\nQ2_K"
    )


def test_other_types_than_told_are_noticed(monkeypatch, tmp_path):
    place(tmp_path, monkeypatch, COPIES)
    write_file(tmp_path / "result", TYPES | {"c.weight": Kind.Q3_K})
    file = write_file(tmp_path / "m.gguf", dict.fromkeys(TYPES, Kind.Q8_0))
    with pytest.raises(ValueError, match=r"c\.weight is Q3_K, not Q2_K; install a newer"):
        quantizer.run(str(tmp_path / "llama-quantize"), file, TYPES, quiet())


def test_failure_shows_what_the_program_said(monkeypatch, tmp_path):
    place(tmp_path, monkeypatch, "print('out of luck'); sys.exit(3)")
    file = tmp_path / "m.gguf"
    file.write_bytes(b"weights")
    with pytest.raises(ValueError, match="exit code 3: out of luck"):
        quantizer.run(str(tmp_path / "llama-quantize"), file, TYPES, quiet())

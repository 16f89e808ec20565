"""Damaged GGUF files are refused with a message, whatever is wrong with them."""

import struct

import gguf
import numpy as np
import pytest

from dsjax.checkpoint.gguf.container import read_header


@pytest.fixture
def whole(tmp_path):
    """A file by the package's own writer."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.eps", 0.5)
    writer.add_bool("llama.flag", True)
    writer.add_string("general.name", "m\u00fc")
    writer.add_array("words", ["a", "", "\u4e2d"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    values = np.random.default_rng(0).normal(size=(4, 5, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("two", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_header_is_read(whole):
    found = read_header(whole)
    assert found.version == 3
    assert found.keys == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.eps": 0.5,
        "llama.flag": True,
        "general.name": "m\u00fc",
        "words": ["a", "", "\u4e2d"],
        "numbers": [1, -2, 3],
    }
    shapes = {name: (tensor.type.name, tensor.shape) for name, tensor in found.tensors.items()}
    assert shapes == {"one": ("F32", (2, 3)), "two": ("Q8_0", (4, 5, 64))}
    assert found.rows("one", 1, 2).view(np.float32).tolist() == [[3, 4, 5]]
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(whole).tensors}
    rows = theirs["two"].reshape(20, -1)[7:9]
    np.testing.assert_array_equal(found.rows("two", 7, 9), rows)


def test_every_truncation_is_refused(whole, tmp_path):
    data, cut = whole.read_bytes(), tmp_path / "cut.gguf"
    header = read_header(whole).tensors["one"].offset
    # The last tensor's padding may be missing.
    end = max(tensor.offset + tensor.n_bytes for tensor in read_header(whole).tensors.values())
    for size in [*range(0, header, 3), header, end - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            read_header(cut)


def test_flipped_bytes_never_escape(whole, tmp_path):
    """Whatever a byte becomes, reading gives a header or a ValueError, soon."""
    data, bad = whole.read_bytes(), tmp_path / "bad.gguf"
    header = read_header(whole).tensors["one"].offset
    for at in range(header):
        for value in (0, 0xFF):
            bad.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            try:
                read_header(bad)
            except ValueError as error:
                assert "bad.gguf" in str(error)


def at_offset(name, skip):
    """Where a field of a tensor's entry is, counted from the end of its name."""
    return lambda data: data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + skip


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (lambda data: 0, b"GGML", "it does not begin with the letters GGUF"),
        (lambda data: 0, b"PK\x03\x04", "a zip archive"),
        (lambda data: 4, struct.pack("<I", 9), "version 9, and 2 and 3 can be read"),
        (lambda data: 4, struct.pack(">I", 3), "other order of bytes"),
        (lambda data: 8, struct.pack("<Q", 1 << 60), "claims 1,152,921,504,606,846,976 tensors"),
        (lambda data: 16, struct.pack("<Q", 1 << 40), "keys, more than a file of"),
        (at_offset(b"words", 8), struct.pack("<Q", 1 << 50), "strings, more than the file"),
        (at_offset(b"numbers", 8), struct.pack("<Q", 1 << 50), "truncated or damaged"),
        (at_offset(b"general.name", 4), struct.pack("<Q", 1 << 62), "claims .* bytes"),
        (at_offset(b"one", 0), struct.pack("<I", 77), "claims 77 dimensions"),
        (at_offset(b"one", 4), struct.pack("<Q", 0), r"claims the shape \[2, 0\]"),
        (at_offset(b"one", 20), struct.pack("<I", 999), "type 999, unknown"),
        (at_offset(b"one", 24), struct.pack("<Q", 7), "not aligned to 32"),
        (at_offset(b"two", 4), struct.pack("<Q", 33), "rows of 33 values"),
        (at_offset(b"two", 32), struct.pack("<Q", 1 << 40), "outside the file"),
        (at_offset(b"two", 32), struct.pack("<Q", 0), "overlaps"),
    ],
)
def test_damage_is_named(whole, tmp_path, place, new, message):
    data, bad = whole.read_bytes(), tmp_path / "bad.gguf"
    at = place(data)
    bad.write_bytes(data[:at] + new + data[at + len(new) :])
    with pytest.raises(ValueError, match=message):
        read_header(bad)


def test_key_or_tensor_given_twice_is_refused(whole, tmp_path):
    data, bad = whole.read_bytes(), tmp_path / "bad.gguf"
    bad.write_bytes(data.replace(b"llama.flag", b"llama.eps\x00").replace(b"one", b"two"))
    with pytest.raises(ValueError, match="twice"):
        read_header(bad)


def test_file_that_changes_while_read_is_refused(whole):
    found = read_header(whole)
    with whole.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="changed its length"):
        found.rows("one", 0, 1)

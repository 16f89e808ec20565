"""Every compression gives the bytes back, and damage is told by name."""

import bz2
import gzip
import lzma

import pytest
import zstandard

from dsjax.data.decompression import SUFFIXES, opened

COMPRESS = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
DATA = bytes(range(256)) * 40


def test_every_suffix_is_tried_here():
    assert {"", *SUFFIXES} == set(COMPRESS)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_bytes_come_back_also_of_two_files_in_one(tmp_path, suffix):
    pack = COMPRESS[suffix]
    path = tmp_path / f"a{suffix.upper()}"
    path.write_bytes(pack(DATA[:99]) + pack(DATA[99:]))
    with opened(str(path)) as stream:
        assert stream.read() == DATA


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["cut", "not compressed"])
def test_damage_is_told_with_the_file(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](DATA)[:-5] if damage == "cut" else b"plain text" * 9)
    with pytest.raises(ValueError, match=rf"a\{suffix} is damaged or cut short .*not \{suffix}"):
        with opened(str(path)) as stream:
            stream.read()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_missing_file_stays_an_error_of_the_system(tmp_path, suffix):
    with pytest.raises(FileNotFoundError), opened(str(tmp_path / f"a{suffix}")) as stream:
        stream.read()

"""Parquet files in pieces."""

import numpy as np
import pyarrow as pa
import pytest

from dsjax.curate import shards

SCHEMA = pa.schema([("name", pa.string()), ("value", pa.float64())])


def write(path, count, size=0):
    with shards.Writer(path, SCHEMA) as writer:
        for number in range(count):
            writer.add({"name": f"n{number}", "value": number / 2}, size)


def test_rows_come_back_in_order(tmp_path):
    write(tmp_path / "a.parquet", 5, size=shards.PIECE_BYTES // 2)
    assert [len(piece) for piece in shards.pieces(tmp_path / "a.parquet")] == [2, 2, 1]
    assert [row["name"] for row in shards.rows(tmp_path / "a.parquet")] == [
        f"n{number}" for number in range(5)
    ]
    assert list(shards.rows(tmp_path / "a.parquet", ["value"]))[3] == {"value": 1.5}
    found = shards.arrays(tmp_path / "a.parquet", ["value"])["value"]
    assert np.array_equal(found, np.arange(5) / 2)


def test_empty_file_is_readable(tmp_path):
    write(tmp_path / "a.parquet", 0)
    assert list(shards.rows(tmp_path / "a.parquet")) == []
    assert len(shards.arrays(tmp_path / "a.parquet", ["name"])["name"]) == 0


def test_same_rows_make_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, 20)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_failure_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), shards.Writer(tmp_path / "a.parquet", SCHEMA) as writer:
        writer.add({"name": "n", "value": 1.0})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []

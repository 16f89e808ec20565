"""Batches of rows are placed on the mesh, whatever the rows hold, and counted."""

import jax
import numpy as np
import pytest

from dsjax.parallel.mesh import make_mesh
from dsjax.train.source import RowSource


class Conversations:
    """Rows that are not packed text: ids and a weight per token."""

    def __init__(self, **identity):
        self.identity = {"fingerprint": "c", "length": 5} | identity

    def epochs(self, row):
        return row / 32

    def __getitem__(self, row):
        return {
            "tokens": np.arange(5, dtype=np.int32) + 10 * row,
            "weights": np.full(5, row / 4, np.float32),
        }


@pytest.fixture
def make_source():
    sources = []

    def make(rows=None):
        mesh = make_mesh({"data": 2, "fsdp": 2}, n_devices=4)
        sources.append(RowSource(rows or Conversations(), mesh, micro_batch_size=4, length=5))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def test_rows_of_any_kind_are_spread_over_the_mesh(make_source):
    source = make_source()
    source.take(8, None)
    taken = source.take(8, None)
    assert (taken.tokens, taken.rows, dict(taken.metrics)) == (8 * 4, range(8, 16), {"epoch": 0.5})
    tokens, weights = taken.batch["tokens"], taken.batch["weights"]
    assert tokens.shape == (2, 4, 5) and weights.dtype == np.float32
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(2, 1, 5)}
    np.testing.assert_array_equal(np.asarray(tokens)[..., 0].ravel(), 10 * np.arange(8, 16))
    np.testing.assert_array_equal(np.asarray(weights)[..., 0].ravel(), np.arange(8, 16) / 4)
    assert all(isinstance(array, jax.Array) for array in taken.batch.values())


def test_restored_source_goes_on_where_its_state_was_taken(make_source):
    source, other = make_source(), make_source()
    source.take(8, None)
    other.restore(source.state())
    for _ in range(2):
        got, want = other.take(4, None), source.take(4, None)
        assert got.rows == want.rows
        np.testing.assert_array_equal(got.batch["tokens"], want.batch["tokens"])


def test_state_of_other_rows_is_refused(make_source):
    rows = Conversations(fingerprint="d", length=6)
    with pytest.raises(
        ValueError,
        match=r"fingerprint was c, is d \(the text.*; length was 5, is 6 \(set it back\)",
    ):
        make_source(rows).restore(make_source().state())

"""Batches on a mesh, read whole or in parts."""

import jax
import numpy as np
import pytest

from dsjax.parallel.mesh import make_mesh
from dsjax.train.batches import batch_sharding, held_rows, place_all, place_held

SHAPE = (2, 8, 5)  # micro-batches, sequences, T + 1


def _batch():
    return np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE)


@pytest.mark.parametrize("sizes", [{"data": 4, "fsdp": 2}, {"data": 2, "context": 4}, {"pipe": 8}])
def test_placed_batch_is_the_batch(sizes):
    mesh, batch = make_mesh(sizes), _batch()
    whole = place_all({"tokens": batch}, mesh)["tokens"]
    held = held_rows(SHAPE, mesh)
    np.testing.assert_array_equal(held, np.arange(16))
    parts = place_held({"tokens": batch.reshape(-1, 5)[held]}, SHAPE, mesh)["tokens"]
    for array in (whole, parts):
        np.testing.assert_array_equal(array, batch)
        assert array.sharding == batch_sharding(SHAPE, mesh)
    shards = {shard.data.shape for shard in whole.addressable_shards}
    assert shards == {(2, 8 // mesh.shape["data"] // mesh.shape["fsdp"], 5)}


@pytest.mark.parametrize("sizes", [{"data": 4, "fsdp": 2}, {"data": 2, "context": 4}])
@pytest.mark.parametrize("inside", [(), (5, 3)], ids=["per sequence", "several per token"])
def test_other_numbers_lie_with_their_sequences(inside, sizes):
    mesh, shape = make_mesh(sizes), (16, *inside)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    rows = {"tokens": _batch(), "values": values.reshape(2, 8, *inside)}
    whole = place_all(rows, mesh)
    flat = {"tokens": _batch().reshape(-1, 5), "values": values}
    parts = place_held(flat, SHAPE, mesh)
    for placed in (whole, parts):
        np.testing.assert_array_equal(placed["values"], rows["values"])
        assert placed["values"].sharding.spec[1] == placed["tokens"].sharding.spec[1]
    held = {shard.data.shape for shard in whole["values"].addressable_shards}
    assert held == {(2, 8 // mesh.shape["data"] // mesh.shape["fsdp"], *inside)}


def test_process_holds_its_rows_of_every_micro_batch(monkeypatch):
    """As if the last four of the eight devices were another process's."""
    all_of = jax.sharding.NamedSharding.devices_indices_map

    def first_half(sharding, shape):
        return dict(list(all_of(sharding, shape).items())[:4])

    kind = jax.sharding.NamedSharding
    monkeypatch.setattr(kind, "addressable_devices_indices_map", first_half)
    split, copied = make_mesh({"data": 8}), make_mesh({"data": 4, "tensor": 2})
    np.testing.assert_array_equal(held_rows(SHAPE, split), [0, 1, 2, 3, 8, 9, 10, 11])
    np.testing.assert_array_equal(held_rows(SHAPE, copied), [0, 1, 2, 3, 8, 9, 10, 11])
    np.testing.assert_array_equal(held_rows(SHAPE, make_mesh({"tensor": 8})), np.arange(16))


def test_sequences_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"micro_batch_size.*batch=4.*over mesh\.data=8"):
        batch_sharding((4, 5), make_mesh({"data": 8}))

"""Layers are dealt out evenly, reach the ranks that work on them, and come back added up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.parallel import stages
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.stages import NONE

MESH = {"pipe": 2, "fsdp": 2, "expert": 2}
SPEC = PartitionSpec(None, "expert", ("fsdp", "pipe"))
WHOLE = PartitionSpec(None, "expert", "fsdp")
PLACED = np.array([[[0, NONE], [1, 2]], [[1, 2], [0, NONE]]], np.int32)  # as in DualPipe


@pytest.mark.parametrize(
    ("n_layers", "n_stages", "lengths"),
    [(4, 4, [1, 1, 1, 1]), (5, 2, [2, 3]), (7, 4, [1, 2, 2, 2]), (58, 16, None)],
)
def test_layers_are_dealt_out_in_order_and_evenly(n_layers, n_stages, lengths):
    found = stages.stage_layers(n_layers, n_stages)
    assert found[found != NONE].tolist() == list(range(n_layers))
    counts = (found != NONE).sum(axis=1).tolist()
    assert max(counts) == found.shape[1] and max(counts) - min(counts) <= 1
    if lengths:
        assert counts == lengths


@pytest.fixture
def arrays():
    """3 layers: an array that `pipe` splits, and one that every rank holds whole."""
    mesh = make_mesh(MESH, 8)
    values = jnp.arange(3 * 4 * 8, dtype=jnp.float32).reshape(3, 4, 8)
    specs = {"split": SPEC, "whole": WHOLE}
    with jax.set_mesh(mesh):
        yield (
            {
                name: jax.device_put(values, NamedSharding(mesh, spec))
                for name, spec in specs.items()
            },
            specs,
        )


def _bring(arrays, specs):
    return jax.jit(lambda x: stages.bring(x, specs, PLACED))(arrays)


def test_each_rank_gets_the_layers_that_it_works_on(arrays):
    stored, specs = arrays
    for found in _bring(stored, specs).values():
        want = np.asarray(stored["whole"])[[0, 0, 1, 2, 1, 2, 0, 0]]
        np.testing.assert_array_equal(found, want)
        # other axes still split it: 4 of 8 layers, half of the experts, half of the width
        assert {shard.data.shape for shard in found.addressable_shards} == {(4, 2, 4)}


def test_copies_come_back_added_and_places_without_a_layer_do_not_count(arrays):
    stored, specs = arrays
    worked = _bring(stored, specs)
    found = jax.jit(lambda x: stages.give_back(x, specs, PLACED))(worked)
    for name, spec in specs.items():
        np.testing.assert_array_equal(found[name], 2 * np.asarray(stored[name]))
        assert found[name].sharding.is_equivalent_to(stored[name].sharding, 3), spec


def test_what_all_ranks_need_is_gathered(arrays):
    stored, specs = arrays
    found = jax.jit(lambda x: stages.gather(x, specs))(stored)
    for name in specs:
        np.testing.assert_array_equal(found[name], stored[name])
        assert {shard.data.shape for shard in found[name].addressable_shards} == {(3, 2, 4)}


def test_an_array_that_only_the_pipeline_splits_is_gathered():
    mesh = make_mesh(MESH, 8)
    with jax.set_mesh(mesh):
        stored = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("pipe")))
        found = jax.jit(lambda x: stages.gather(x, PartitionSpec("pipe")))(stored)
    np.testing.assert_array_equal(found, np.arange(8.0))
    assert found.sharding.is_fully_replicated


def test_nothing_is_gathered_over_other_axes_on_the_way(arrays):
    """The compiler would put together what other axes split, and 671B would not fit."""
    stored, specs = arrays
    program = jax.jit(lambda x: stages.bring(x, specs, PLACED)).lower(stored).compile().as_text()
    assert "all-to-all" in program and "all-gather" not in program

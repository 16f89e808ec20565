"""A flipped bit in one device's copy is seen, and the device named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.replicas import mismatches
from tests.checkpoint.damage import with_flipped_bit

RNG = np.random.default_rng(0)
HOST = {
    "weight": RNG.normal(size=(8, 16)).astype(np.float32),
    "moment": RNG.normal(size=(16, 4)).astype(jnp.bfloat16),
    "count": np.int32(7),
    "split": RNG.normal(size=(8, 8)).astype(np.float32),
}
SPECS = {"weight": ("fsdp",), "moment": (None, "tensor"), "count": (), "split": (("data", "fsdp"),)}


def place(sizes):
    mesh = make_mesh(sizes)
    specs = {name: PartitionSpec(*SPECS[name]) for name in HOST}
    arrays = {
        name: jax.device_put(jnp.asarray(value), NamedSharding(mesh, specs[name]))
        for name, value in HOST.items()
    }
    return mesh, arrays


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "fsdp": 2}], ids=str)
def test_flipped_bit_in_one_copy_is_seen_and_its_device_named(sizes):
    mesh, arrays = place(sizes)
    assert mismatches(arrays, mesh) == []
    for name, bit in (("weight", 3), ("weight", 200), ("moment", 77), ("count", 31)):
        for device in mesh.devices.flat[:3]:
            harmed = arrays | {name: with_flipped_bit(arrays[name], device, bit)}
            assert mismatches(harmed, mesh) == [(name, (device,))]


def test_of_two_copies_that_differ_both_are_named():
    mesh, arrays = place({"data": 2, "fsdp": 4})
    first = mesh.devices.flat[0]
    harmed = arrays | {"weight": with_flipped_bit(arrays["weight"], first, 5)}
    ((name, devices),) = mismatches(harmed, mesh)
    assert name == "weight" and len(devices) == 2 and first in devices


def test_array_without_copies_is_left_alone():
    mesh, arrays = place({"data": 2, "fsdp": 4})
    assert mismatches({"split": arrays["split"]}, mesh) == []

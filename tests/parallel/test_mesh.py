from dataclasses import dataclass

import jax
import numpy as np
import pytest

from dsjax.axes import AXES
from dsjax.parallel.mesh import make_mesh, regrouped, resolve, submesh, two_meshes


def sizes_above_one(mesh):
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def test_mesh_gives_what_is_left_to_the_open_axis():
    mesh = make_mesh({"data": -1, "fsdp": 2, "tensor": 2})
    assert sizes_above_one(mesh) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_names == AXES


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": 3}, {"data": 16}])
def test_mesh_rejects_sizes_that_do_not_fill_the_devices(sizes):
    with pytest.raises(ValueError, match=r"does not fill the 8 devices here; set mesh"):
        make_mesh(sizes)


def test_regrouped_mesh_has_the_same_devices_in_the_same_order():
    mesh = make_mesh({"fsdp": 4, "expert": 2})
    found = regrouped(mesh, {"expert": -1, "tensor": 2})
    assert sizes_above_one(found) == {"expert": 4, "tensor": 2} and found.axis_names == AXES
    assert list(found.devices.flat) == list(mesh.devices.flat)
    with pytest.raises(ValueError, match=r"rollout_mesh tensor=3 does not.*set rollout_mesh\.\*"):
        regrouped(mesh, {"tensor": 3})


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": 2, "tensor": 2}, {"data": 2, "tensor": 2}),
        ({"tensor": -1}, {"tensor": 8}),
        ({"data": 2, "fsdp": -1}, {"data": 2, "fsdp": 4}),
        ({"expert": 2, "context": 2, "pipe": 2}, {"pipe": 2, "expert": 2, "context": 2}),
        ({"tensor": 1}, {}),
    ],
)
def test_submesh_takes_the_devices_that_its_sizes_need(sizes, shape):
    mesh = submesh(sizes)
    assert mesh is not None and sizes_above_one(mesh) == shape


def test_submesh_of_no_sizes_is_no_mesh():
    assert submesh({}) is None


def test_submesh_rejects_more_devices_than_there_are():
    with pytest.raises(ValueError, match=r"data=4 x tensor=4 needs 16 devices, there are 8"):
        submesh({"data": 4, "tensor": 4})
    with pytest.raises(ValueError, match="does not fill the 8 devices"):
        submesh({"data": 3, "tensor": -1})


def test_sizes_are_resolved_without_devices():
    sizes = resolve({"data": -1, "fsdp": 8, "expert": 64}, 4096)
    assert tuple(sizes) == AXES and (sizes["data"], sizes["fsdp"], sizes["tensor"]) == (8, 8, 1)
    with pytest.raises(ValueError, match="does not fill the 100 devices"):
        resolve({"data": -1, "fsdp": 8}, 100)


@dataclass(frozen=True)
class Chip:
    """As much of a device as its place in a mesh depends on."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize(
    ("sizes", "across"),
    [
        ({"data": 4, "tensor": 4}, {"data": 4}),
        ({"data": 2, "fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2}),
        ({"pipe": 2, "fsdp": 8}, {"pipe": 2, "fsdp": 2}),
    ],
)
def test_slices_are_told_apart_by_the_outermost_axes(sizes, across):
    mesh = make_mesh(sizes, devices=[Chip(i, i % 4) for i in range(16)])
    slices = np.vectorize(lambda chip: chip.slice_index, otypes=[int])(np.asarray(mesh.devices))
    for position, axis in enumerate(AXES):
        # the parts of an axis between which the slice changes
        changes = np.diff(slices, axis=position) != 0
        assert changes.any() == (axis in across), axis
        assert changes.any(axis=tuple(set(range(6)) - {position})).sum() == across.get(axis, 1) - 1


@pytest.mark.parametrize(
    ("sizes", "others", "counts"),
    [
        ({"data": 2, "tensor": 2}, {"expert": 3}, (4, 3)),
        ({"tensor": -1}, {"data": 2}, (6, 2)),
        ({"tensor": 2}, {"data": 3, "tensor": -1}, (2, 6)),
        ({}, {"context": -1}, (1, 7)),
    ],
)
def test_two_meshes_share_no_device(sizes, others, counts):
    mesh, other = two_meshes(sizes, others)
    first = list(mesh.devices.flat) if mesh else jax.devices()[:1]
    assert (len(first), other.size) == counts
    assert not set(first) & set(other.devices.flat) and (mesh is None) == (not sizes)


def test_no_sizes_of_a_second_mesh_are_none():
    mesh, other = two_meshes({"tensor": 2}, {})
    assert mesh == submesh({"tensor": 2}) and other is None


def test_two_meshes_that_the_devices_do_not_make_are_refused():
    with pytest.raises(
        ValueError, match=r"^mesh tensor=4 and prefill_mesh data=2 x expert=4 need 12 devices .* 8"
    ):
        two_meshes({"tensor": 4}, {"data": 2, "expert": 4})
    with pytest.raises(ValueError, match="mesh of one device and prefill_mesh data=8 need 9"):
        two_meshes({}, {"data": 8})
    with pytest.raises(ValueError, match="each take what the other leaves; give the sizes of one"):
        two_meshes({"data": -1}, {"tensor": -1})
    with pytest.raises(ValueError, match=r"prefill_mesh data=3 x tensor=-1 does not fill the 5 de"):
        two_meshes({"tensor": 3}, {"data": 3, "tensor": -1})

import pytest

from dsjax.parallel.mesh import AXES, make_mesh


def test_mesh_gives_what_is_left_to_the_open_axis():
    mesh = make_mesh({"data": -1, "fsdp": 2, "tensor": 2})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_names == AXES


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": 3}, {"data": 16}])
def test_mesh_rejects_sizes_that_do_not_fill_the_devices(sizes):
    with pytest.raises(ValueError, match=r"does not fill the 8 devices here; set mesh"):
        make_mesh(sizes)

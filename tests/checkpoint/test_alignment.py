"""The file of what projects hidden states: read as it was written, and refused where it does not
fit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint.alignment import FILE, load_alignment, write_alignment
from dsjax.checkpoint.tensor_files import read_header
from dsjax.model.parameters import initialize
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.vision.alignment import Alignment

POLICY = Policy(jnp.float32)


def test_what_projects_is_read_as_it_was_written(tmp_path):
    declared = Alignment(8, 6, POLICY)
    whole = jax.tree.map(np.asarray, initialize(declared, jax.random.key(0)))
    write_alignment(tmp_path, whole)
    found, _ = read_header(tmp_path / FILE)
    assert {name: info.shape for name, info in found.items()} == {  # as PyTorch has them
        "layers.0.weight": (8, 8), "layers.0.bias": (8,), "layers.1.weight": (8, 8),
        "layers.1.bias": (8,), "layers.2.weight": (6, 8), "layers.2.bias": (6,),
    }  # fmt: skip
    mesh = make_mesh({"data": 2, "fsdp": 2}, n_devices=4)
    read = load_alignment(tmp_path / FILE, declared, mesh)
    for one, other in zip(*map(jax.tree.leaves, (read, whole)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert isinstance(one, jax.Array) and len(one.sharding.device_set) == 4
    with pytest.raises(ValueError, match=r"does not fit the model .*layers.0.bias \[8\].*leave it"):
        load_alignment(tmp_path / FILE, Alignment(16, 6, POLICY), mesh)

"""A folder that was read and written again is the same, and the same on a mesh."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.checkpoint.load import open_checkpoint
from dsjax.checkpoint.sighted import load_masters, write_sighted
from dsjax.config import PrecisionConfig
from dsjax.files import read_json
from dsjax.parallel.mesh import make_mesh
from dsjax.train.step import declared_model, split
from dsjax.vision.sighted import Sighted
from tests.golden import vl2
from tests.vision import toy


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("family", ["janus", "multi_modality"])
def test_weights_come_back_bit_for_bit(family, devices, tmp_path, monkeypatch):
    toy.shrink_deepseeks(monkeypatch)
    vision = toy.deepseeks() if family == "multi_modality" else toy.VISION
    checkpoint = open_checkpoint(toy.write(tmp_path / "one", family, vision))
    hf, mesh = checkpoint.hf, make_mesh({"fsdp": devices}, n_devices=devices)
    params, router = load_masters(checkpoint, mesh)
    policy = declared_model(checkpoint.model, PrecisionConfig(compute="float32")).policy
    structure, *_ = split(Sighted(checkpoint.model, hf.beside.vision, policy))
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    (tmp_path / "two").mkdir()
    write_sighted(
        tmp_path / "two",
        nnx.merge(structure, params, router),
        hf.family,
        hf.beside.parts,
        hf.config,
        np.dtype(np.float32),
        lambda array: np.asarray(whole(array)),
    )
    again = open_checkpoint(tmp_path / "two").hf
    assert read_json(tmp_path / "two" / "config.json") == read_json(
        tmp_path / "one" / "config.json"
    )
    assert again.files.tensors.keys() == hf.files.tensors.keys()
    for name in hf.files.tensors:
        assert again.files.read(name).tobytes() == hf.files.read(name).tobytes(), name


def test_process_that_does_not_write_gathers_all_the_same(tmp_path):
    gathered = []
    model = nnx.Dict(one=nnx.Param(np.ones(2)), two=nnx.Param(np.ones(3)))
    write_sighted(
        tmp_path, model, "janus", [], {}, np.dtype(np.float32), gathered.append, writes=False
    )
    assert [len(array) for array in gathered] == [2, 3] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_biases_of_experts_are_written_and_stay_float32(dtype, tmp_path):
    """DeepSeek-VL2 Base's."""
    checkpoint = open_checkpoint(vl2.write(tmp_path / "one", vl2.CASES["latent"]))
    hf, mesh = checkpoint.hf, make_mesh({"data": 1}, n_devices=1)
    params, router = load_masters(checkpoint, mesh)
    policy = declared_model(checkpoint.model, PrecisionConfig(compute="float32")).policy
    structure, *_ = split(Sighted(checkpoint.model, hf.beside.vision, policy))
    (tmp_path / "two").mkdir()
    model = nnx.merge(structure, params, router)
    write_sighted(tmp_path / "two", model, hf.family, hf.beside.parts, hf.config, np.dtype(dtype))
    again = open_checkpoint(tmp_path / "two").hf
    assert again.files.tensors.keys() == hf.files.tensors.keys()
    for name in hf.files.tensors:
        kept = np.float32 if name.endswith("e_score_correction_bias") else dtype
        want = hf.files.read(name).astype(kept)
        assert again.files.read(name).tobytes() == want.tobytes(), name

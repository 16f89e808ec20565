"""What is beside a language model, loaded and written again."""

import types

import jax
import numpy as np
import pytest

from dsjax.checkpoint import load
from dsjax.checkpoint.eyes import load_eyes, published
from dsjax.files import read_json, write_json
from dsjax.parallel.mesh import make_mesh
from tests.closeness import LOGITS, assert_close
from tests.vision import toy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load.open_checkpoint(toy.write(tmp_path_factory.mktemp("janus")))


def test_published_tensors_come_back_to_the_bit(checkpoint):
    wanted = toy.tensors("janus")
    got = published(load_eyes(checkpoint), checkpoint.hf.beside.parts)
    assert got.keys() == {name for name in wanted if not name.startswith(("model.lang", "lm_"))}
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor, wanted[name], err_msg=name)


def test_the_language_model_is_loaded_from_the_same_folder(checkpoint):
    wanted = toy.tensors("janus")
    model = load.load(checkpoint)
    head = np.asarray(model.head.weight[...])
    np.testing.assert_array_equal(head, wanted["lm_head.weight"].T)
    layer = np.asarray(model.dense_layers.attn.wq[...])[1]
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(layer, wanted[name].T)


def test_sharded_weights_see_the_same(checkpoint):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, n_devices=8)
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, 9, 9, 3)).astype(np.float32)
    wanted = jax.jit(load_eyes(checkpoint))(pixels)
    eyes = load_eyes(checkpoint, mesh=mesh)
    assert len(eyes.tower.positions[...].sharding.device_set) == 8
    with jax.set_mesh(mesh):
        got = jax.jit(lambda eyes, pixels: eyes(pixels))(eyes, pixels)
    assert_close(got, wanted, LOGITS)


def test_janusflow_comes_back_to_the_bit(tmp_path, monkeypatch):
    toy.shrink_deepseeks(monkeypatch)
    folder = toy.write(tmp_path, "multi_modality", toy.flowing())
    checkpoint = load.open_checkpoint(folder)
    wanted = toy.tensors("multi_modality", toy.flowing())
    got = published(load_eyes(checkpoint), checkpoint.hf.beside.parts)
    assert got.keys() == {name for name in wanted if not name.startswith("language_model")}
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor, wanted[name], err_msg=name)


def test_a_language_model_alone_has_no_eyes(tmp_path):
    alone = types.SimpleNamespace(hf=None, path=tmp_path)
    with pytest.raises(ValueError, match="is a language model alone"):
        load_eyes(alone)  # type: ignore


def test_a_head_of_its_own_is_obeyed_whatever_the_config_says(tmp_path):
    folder = toy.write(tmp_path)
    said = read_json(folder / "config.json")
    del said["tie_word_embeddings"]  # true by default
    write_json(folder / "config.json", said)
    assert not load.open_checkpoint(folder).model.tie_embed

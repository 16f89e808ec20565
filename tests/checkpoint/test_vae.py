"""A VAE's folder: its names, older ones, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import vae
from dsjax.config.vision import VaeConfig
from dsjax.files import read_json, write_json
from dsjax.model.parameters import declarations
from dsjax.precision.policy import Policy
from dsjax.vision.vae import Vae
from tests.checkpoint import hf_files
from tests.golden.janusflow import VAE_CONFIG, weight

SDXL = VAE_CONFIG | {
    "_diffusers_version": "0.18.0.dev0",
    "_name_or_path": "../sdxl-vae/",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def tensors():
    return {part.name: weight(part.name, part.shape) for part in vae.parts(vae.read(VAE_CONFIG))}


def write(folder, tensors, config=VAE_CONFIG):
    hf_files.write(folder, config, tensors)
    (folder / "model.safetensors").rename(folder / vae.WEIGHTS)
    return folder


def leaves(folder):
    loaded = vae.load_vae(vae.open_vae(folder))
    return {path: np.asarray(leaf[...]) for path, leaf in named(loaded)}


def named(module):
    import jax

    paths = [each.path for each in declarations(module)]
    return zip(paths, jax.tree.leaves(module), strict=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("vae"), tensors())


def test_sdxls_is_described_and_named():
    config = vae.read(SDXL)
    assert config == VaeConfig()
    parts = list(vae.parts(config))
    assert (len(parts), sum(part.n_parameters for part in parts)) == (248, 83_653_863)
    declared = {each.path: each.count for each in declarations(Vae(config, Policy(jnp.float32)))}
    assert {".".join(part.path): part.n_parameters for part in parts} == declared


def test_older_names_are_the_same_weights(folder, tmp_path):
    older = {}
    for name, tensor in tensors().items():
        for new, old in OLDER.items():
            name = name.replace(f".{new}.", f".{old}.")
        if "proj_attn.weight" in name or "query.weight" in name:
            tensor = tensor[:, :, None, None]  # as a convolution
        older[name] = tensor
    assert sum("query" in name for name in older) == 4
    wanted, got = leaves(folder), leaves(write(tmp_path, older))
    assert wanted.keys() == got.keys()
    for path, leaf in got.items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


def test_weights_become_float32(tmp_path):
    half = {name: tensor.astype(np.float16) for name, tensor in tensors().items()}
    got = leaves(write(tmp_path, half))
    assert {leaf.dtype for leaf in got.values()} == {np.dtype(np.float32)}


def test_a_folder_without_a_vae_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"download config\.json and diffusion_pytorch_model"):
        vae.open_vae(tmp_path)
    (tmp_path / "vae").mkdir()
    write_json(tmp_path / "vae" / "config.json", VAE_CONFIG)
    with pytest.raises(ValueError, match=r"holds a whole pipeline; its VAE is in .*vae: name that"):
        vae.open_vae(tmp_path)


def test_tensors_that_differ_from_the_config_are_named(tmp_path):
    wrong = tensors()
    wrong["extra"] = wrong.pop("quant_conv.bias")
    wrong["encoder.conv_in.bias"] = wrong["encoder.conv_in.bias"][:3]
    with pytest.raises(ValueError) as caught:
        vae.open_vae(write(tmp_path, wrong))
    for said in ("missing quant_conv.bias", "unexpected extra", "conv_in.bias is float32[3]"):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "VQModel"}, "_class_name='VQModel' is not supported"),
        ({"use_quant_conv": False}, "use_quant_conv=False"),
        ({"shift_factor": 0.1}, "has shift_factor"),
        ({"block_out_channels": [32, 48]}, "is not a list of multiples of its first"),
        ({"block_out_channels": None}, "block_out_channels=None"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types=['DownBlock2D']"),
    ],
)
def test_other_kinds_are_refused(folder, tmp_path, changes, said):
    config = read_json(folder / "config.json") | changes
    with pytest.raises(
        ValueError, match="JanusFlow was trained with stabilityai/sdxl-vae"
    ) as caught:
        vae.open_vae(write(tmp_path, tensors(), config))
    assert said in str(caught.value)

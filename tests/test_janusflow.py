"""JanusFlow against DeepSeek's own code and its VAE against diffusers, whose outputs
tests/golden/janusflow.npz holds (tests/golden/make_janusflow.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import names, vae
from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.families import deepseek_tower, janusflow
from dsjax.checkpoint.hf_config import from_hf, vision_of
from dsjax.checkpoint.load import load, open_checkpoint
from dsjax.config.vision import SiglipConfig
from dsjax.generate.flow import Painter
from dsjax.model.transformer import Embeddings
from tests.checkpoint import hf_files
from tests.closeness import LOGITS, assert_close, relative_l2
from tests.golden import janusflow as case

TOWER = SiglipConfig(
    image_size=case.IMAGE, patch_size=4, dim=32, n_layers=2, n_heads=2, inter_dim=128, pool=True
)


@pytest.fixture(scope="module")
def golden():
    with np.load(case.GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as published, of DeepSeek's layout with a smaller tower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepseek_tower, "TOWER", TOWER)
        shapes = {
            row.name: row.shape for row in names.tensors(from_hf(case.CONFIG), "multi_modality")
        }
        shapes |= {part.name: part.shape for part in janusflow.parts(vision_of(case.CONFIG))}
        tensors = {name: case.weight(name, shape) for name, shape in shapes.items()}
        folder = tmp_path_factory.mktemp("janusflow")
        hf_files.write(folder, case.CONFIG, tensors)
        return open_checkpoint(folder)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


def write_vae(folder, older=False):
    names = {theirs: old for old, theirs in vae._OLDER.items()} if older else {}
    tensors = {}
    for part in vae.parts(vae.read(case.VAE_CONFIG)):
        name = part.name
        for theirs, old in names.items():
            name = name.replace(f".{theirs}.", f".{old}.")
        tensors[name] = case.weight(part.name, part.shape)
    hf_files.write(folder, case.VAE_CONFIG, tensors)
    (folder / "model.safetensors").rename(folder / vae.WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def eyes(checkpoint):
    return load_eyes(checkpoint)


@pytest.fixture(scope="module")
def painter(checkpoint, eyes, vae_folder):
    decoder = vae.load_vae(vae.open_vae(vae_folder))
    return Painter(load(checkpoint), eyes.brush, decoder, case.GRID)


def test_names_are_deepseeks(golden, checkpoint):
    found = {f"{info.name} {[*info.shape]}" for info in checkpoint.hf.files.tensors.values()}
    assert found == set(golden["names"])


def test_names_are_diffusers(golden):
    parts = vae.parts(vae.read(case.VAE_CONFIG))
    assert {f"{part.name} {[*part.shape]}" for part in parts} == set(golden["vae_names"])


def test_understanding_equals_deepseeks(golden, checkpoint, eyes):
    """Two pictures in one prompt, whose begin tokens' embeddings are the model's own."""
    given = case.inputs()
    features = np.asarray(jax.jit(eyes)(given["pixels"]))
    assert_close(features[:, 1:], golden["features"], LOGITS, "features")
    ids = given["ids"].astype(np.int32)
    places = np.isin(ids, [case.BEGIN, case.PLACEHOLDER])
    values = np.zeros((*ids.shape, case.DIM), np.float32)
    values[places] = features.reshape(-1, case.DIM)
    language = load(checkpoint)
    embeddings = Embeddings(jnp.asarray(places), jnp.asarray(values))
    hidden = language.hidden(jnp.asarray(ids), embeddings=embeddings).main_BTD
    assert_close(language.logits(hidden), golden["logits"], LOGITS, "logits")


def test_parts_of_drawing_equal_deepseeks(golden, eyes):
    given = case.inputs()

    @jax.jit
    def run(brush, latents, times, states):
        noisy = brush.read(latents, times)
        return noisy, brush.velocity(states, noisy)

    noisy, velocity = run(eyes.brush, given["latents"], given["times"], given["states"])
    assert_close(noisy.time_BD, golden["time"], LOGITS, "time")
    assert_close(noisy.inputs_BTD[:, 0], golden["time"], LOGITS, "first input")
    assert_close(noisy.skip_BYXC, golden["encoded"], LOGITS, "encoder")
    assert_close(velocity, golden["velocity"], LOGITS, "velocity")


def test_vae_equals_diffusers(golden, vae_folder):
    module, given = vae.load_vae(vae.open_vae(vae_folder)), case.inputs()
    scaling = module.config.scaling
    latents = jax.jit(lambda vae, pixels: vae.encode(pixels))(module, given["pixels"])
    assert_close(latents.mean_BYXC / scaling, golden["vae_mean"], LOGITS, "mean")
    assert_close(latents.std_BYXC / scaling, golden["vae_std"], LOGITS, "std")
    decode = jax.jit(lambda vae, latents: vae.decode(latents))
    decoded = decode(module, given["noise"][:2] * scaling)
    assert_close(decoded, golden["vae_decoded"], LOGITS, "decoded")


@pytest.mark.parametrize(("name", "guidance"), [("guided", case.GUIDANCE), ("plain", 1.0)])
def test_whole_drawings_equal_the_demo(golden, painter, name, guidance):
    noise = case.inputs()["noise"]
    got = painter.latents(case.PROMPT, noise, guidance=guidance, steps=case.STEPS)
    want = golden[name] * np.float32(case.VAE_CONFIG["scaling_factor"])
    assert_close(got, want, LOGITS)
    pixels = painter.pixels(got)
    pictures = golden[f"{name}_pictures"]
    assert pixels.dtype == np.uint8 and pixels.shape == pictures.shape
    difference = abs(pixels.astype(int) - pictures)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_guidance_changes_what_is_drawn(golden):
    assert relative_l2(golden["guided"], golden["plain"]) > 100 * LOGITS.bound

"""Drawing by a flow against the whole sequence run again at every step, pads and mask included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.vision import FlowConfig, VaeConfig, VisionConfig
from dsjax.generate.flow import Painter
from dsjax.model.inputs import read_tokens
from dsjax.model.parameters import shardings
from dsjax.model.transformer import Embeddings, Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes
from dsjax.vision.vae import Vae
from tests.closeness import LOGITS, assert_close, relative_l2
from tests.vision import toy
from tests.vision.test_projector import random_values

POLICY = Policy(jnp.float32)
PROMPT, GRID, STEPS = (0, 100, 90, 7, 30, 261), 2, 3
VISION = VisionConfig(
    dim=32,
    tower=toy.VISION.tower,
    aligner_depth=1,
    flow=FlowConfig(latent_channels=4, channels=8, encoder_blocks=1, decoder_blocks=1),
)
VAE = VaeConfig(channels=32, multipliers=(1, 2), n_blocks=1)


def scaled(module):
    """Random weights that keep sizes about 1."""

    def scale(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[max(leaf.ndim - 2, 0)]
        return leaf * 2 * fan_in**-0.5 if leaf.ndim > 1 else leaf

    return jax.tree.map(scale, module)


@functools.cache
def models():
    language = scaled(random_values(Transformer(toy.LANGUAGE, POLICY)))
    return language, scaled(random_values(Eyes(VISION, POLICY), 1).brush)


@functools.cache
def painter():
    return Painter(*models(), scaled(random_values(Vae(VAE, POLICY), 2)), GRID)


def noise(n=2):
    return np.random.default_rng(0).normal(size=(n, 4, 4, 4)).astype(np.float32)


def recomputed(noise, guidance):
    """Whole sequences: the prompt without its last token, the time, the latents. The row without a
    prompt is the same but for what it sees, which documents say.
    """
    before, z = len(PROMPT) - 1, noise
    prompted, alone = np.ones(before, np.int32), np.array([1, *[2] * (before - 1)], np.int32)
    for step in range(STEPS):
        time = np.float32(step / STEPS)
        c, u = (velocity(z, time, seen) for seen in (prompted, alone))
        z = z + (guidance * c - (guidance - 1) * u) / STEPS
    return z


@jax.jit
def velocity(latents_BYXC, time, documents_P):
    """What latents do behind a prompt of which document 1 alone is seen; rope counts all of it."""
    language, brush = models()
    noisy = brush.read(latents_BYXC, jnp.full(len(latents_BYXC), time))
    (n, T, _), before = noisy.inputs_BTD.shape, len(documents_P)
    tokens_BT = jnp.tile(jnp.array([*PROMPT[:-1], *[0] * T], jnp.int32), (n, 1))
    documents_BT = jnp.tile(jnp.pad(documents_P, (0, T), constant_values=1), (n, 1))
    places_BT = jnp.tile(jnp.arange(before + T, dtype=jnp.int32), (n, 1))
    inputs = read_tokens(tokens_BT, documents_BT, isolate=True, n_mtp=0)
    values_BTD = jnp.pad(noisy.inputs_BTD, ((0, 0), (before, 0), (0, 0)))
    states_BTD = language.forward(
        inputs._replace(positions=places_BT), embeddings=Embeddings(places_BT >= before, values_BTD)
    ).main_BTD
    return brush.velocity(states_BTD[:, before + 1 :], noisy)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_latents_are_those_of_the_whole_sequence(guidance):
    got = painter().latents(PROMPT, noise(), guidance=guidance, steps=STEPS)
    assert got.dtype == np.float32
    assert_close(got, recomputed(noise(), guidance), LOGITS)


def test_guidance_changes_what_is_drawn():
    drawn = [painter().latents(PROMPT, noise(), guidance=w, steps=STEPS) for w in (5.0, 1.0)]
    assert relative_l2(*drawn) > 100 * LOGITS.bound


def test_a_picture_depends_on_its_seed_not_on_its_company():
    both = painter().noise([5, 6])
    np.testing.assert_array_equal(both[1:], painter().noise([6]))
    assert both.shape == (2, 4, 4, 4) and relative_l2(both[0], both[1]) > 0.5
    together = painter().latents(PROMPT, both, guidance=2.0, steps=STEPS)
    alone = painter().latents(PROMPT, both[1:], guidance=2.0, steps=STEPS)
    assert_close(alone[0], together[1], LOGITS)
    pixels = painter().pixels(together)
    np.testing.assert_array_equal(painter().pixels(together[1:])[0], pixels[1])


def test_noise_is_normal():
    some = Painter(*models(), painter()._vae, 16).noise(range(4))
    assert abs(some.mean()) < 0.02 and abs(some.std() - 1) < 0.02


def test_progress_is_told_step_by_step():
    told = []
    painter().latents(
        PROMPT, noise(), guidance=5.0, steps=2, progress=lambda *done: told.append(done)
    )
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_pixels_are_cut_to_whole_numbers():
    latents = 0.05 * noise()
    found = np.concatenate([np.asarray(painter()._vae.decode(one[None])) for one in latents])
    got = painter().pixels(latents)
    assert got.dtype == np.uint8 and got.shape == (2, 8, 8, 3)
    exact = (np.clip(found, -1, 1) + 1) / 2 * 255
    clear = abs(exact - exact.round()) > 1e-2  # whole numbers may be cut either way
    np.testing.assert_array_equal(got[clear], np.floor(exact[clear]))
    assert clear.mean() > 0.3


def test_a_mesh_draws_the_same():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, n_devices=8)
    modules = (*models(), painter()._vae)
    placed = (jax.device_put(each, shardings(each, mesh)) for each in modules)
    many = Painter(*placed, GRID, mesh)
    got = many.latents(PROMPT, noise(3), guidance=5.0, steps=STEPS)
    want = painter().latents(PROMPT, noise(3), guidance=5.0, steps=STEPS)
    assert_close(got, want, LOGITS)
    difference = many.pixels(want).astype(int) - painter().pixels(want)
    assert abs(difference).max() <= 1

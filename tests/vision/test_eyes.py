import dataclasses

import jax.numpy as jnp
import numpy as np

from dsjax.config.vision import FlowConfig, TilesConfig
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes
from dsjax.vision.projector import unfold
from tests.closeness import F32, assert_close
from tests.vision import toy
from tests.vision.test_projector import oracle_gelu, oracle_linear, random_values


def test_eyes_that_only_see_have_no_pencil():
    seeing = dataclasses.replace(toy.VISION, vq=None)
    assert not hasattr(Eyes(seeing, Policy(jnp.float32)), "pencil")


def test_inputs_of_codes_are_not_the_codebook():
    pencil = random_values(Eyes(toy.VISION, Policy(jnp.float32))).pencil
    codes = np.array([[3, 0, 39]], np.int32)
    x = np.asarray(pencil.embed[...], np.float64)[codes]
    first, second = pencil.aligner.layers
    want = oracle_linear(second, oracle_gelu(oracle_linear(first, x)))
    assert_close(pencil.embeddings(jnp.asarray(codes)), want, F32)


def test_pictures_become_embeddings_of_the_language_model():
    eyes = random_values(Eyes(toy.VISION, Policy(jnp.float32)))
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 9, 9, 3)).astype(np.float32)
    got = eyes(jnp.asarray(pixels))
    assert got.shape == (2, 4, 32)
    assert_close(got, eyes.aligner(eyes.tower(jnp.asarray(pixels))), F32)


FLOW = dataclasses.replace(
    toy.VISION,
    vq=None,
    aligner_depth=1,
    flow=FlowConfig(latent_channels=3, channels=8, encoder_blocks=1, decoder_blocks=1),
)


def test_a_picture_of_janusflow_begins_with_an_embedding_of_its_own():
    eyes = random_values(Eyes(FLOW, Policy(jnp.float32)))
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 9, 9, 3)).astype(np.float32)
    got = eyes(jnp.asarray(pixels))
    assert got.shape == (2, 5, 32)
    assert_close(got[:, 0], np.broadcast_to(eyes.begin[...], (2, 32)), F32)
    assert_close(got[:, 1:], eyes.aligner(eyes.tower(jnp.asarray(pixels))), F32)


def test_latents_become_embeddings_behind_their_time_row_by_row():
    brush = random_values(Eyes(FLOW, Policy(jnp.float32))).brush
    latents = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    noisy = brush.read(jnp.asarray(latents), jnp.array([0.0, 0.5]))
    assert noisy.inputs_BTD.shape == (2, 7, 32)
    assert_close(noisy.inputs_BTD[:, 0], noisy.time_BD, F32)
    want = oracle_linear(brush.encoder_aligner, np.asarray(noisy.skip_BYXC, np.float64)[:, 1, 2])
    assert_close(noisy.inputs_BTD[:, 6], want, F32)
    assert brush.velocity(noisy.inputs_BTD[:, 1:], noisy).shape == latents.shape


def test_eyes_for_tiles_join_patches_and_have_two_embeddings_more():
    tower = dataclasses.replace(toy.VISION.tower, image_size=13)
    vision = dataclasses.replace(
        toy.VISION, tower=tower, vq=None, tiles=TilesConfig(resolutions=((13, 13),))
    )
    eyes = random_values(Eyes(vision, Policy(jnp.float32)))
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 13, 13, 3)).astype(np.float32)
    got = eyes(jnp.asarray(pixels))
    assert got.shape == (2, 4, 32)
    assert_close(got, eyes.aligner(unfold(eyes.tower(jnp.asarray(pixels)), 2)), F32)
    assert eyes.newline.shape == eyes.separator.shape == (32,)

import dataclasses

import jax.numpy as jnp
import numpy as np

from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes
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

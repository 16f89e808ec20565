"""Drawing against the whole sequence run again for each code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.generate.codes import Drawer
from dsjax.generate.sampling import Sampling
from dsjax.model.parameters import shardings
from dsjax.model.transformer import Embeddings, Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes
from tests.vision import toy
from tests.vision.test_projector import random_values

POLICY = Policy(jnp.float32)
PROMPT, BLANK, GRID, GUIDANCE = (0, 100, 90, 7, 261), (0, 2, 2, 2, 261), 2, 5.0
GREEDY = Sampling(temperature=0.0)


@functools.cache
def models():
    language = jax.tree.map(
        lambda leaf: leaf * leaf.shape[-1] ** -0.5 if leaf.ndim > 2 else leaf,
        random_values(Transformer(toy.LANGUAGE, POLICY)),
    )
    return language, random_values(Eyes(toy.VISION, POLICY), 1).pencil


@functools.cache
def drawer():
    return Drawer(*models(), GRID)


@functools.cache
def recomputed(guidance):
    """The likeliest codes, each from both whole rows."""
    language, pencil = models()
    n, total = len(PROMPT), len(PROMPT) + GRID**2
    tokens = np.zeros((2, total), np.int32)
    tokens[:, :n] = PROMPT, BLANK
    given = np.broadcast_to(np.arange(total) >= n, tokens.shape)
    forward = jax.jit(lambda tokens, rest: language.hidden(tokens, embeddings=rest).main_BTD)
    codes = []
    for place in range(GRID**2):
        values = np.zeros((2, total, 32), np.float32)
        if codes:
            values[:, n : n + place] = np.asarray(pencil.embeddings(jnp.array(codes)))
        hidden = forward(tokens, Embeddings(jnp.array(given), jnp.array(values)))
        c, u = np.asarray(pencil.head(hidden[:, n + place - 1]))
        codes.append(int((u + guidance * (c - u)).argmax()))
    return codes


@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_codes_are_those_of_the_whole_sequence(guidance):
    got = drawer().codes(PROMPT, BLANK, [GREEDY], guidance=guidance)
    assert got.shape == (1, GRID, GRID) and got.dtype == np.int32
    assert got.reshape(-1).tolist() == recomputed(guidance)


def test_guidance_changes_what_is_drawn():
    assert recomputed(GUIDANCE) != recomputed(1.0)


def test_a_picture_depends_on_its_seed_not_on_its_company():
    both = drawer().codes(PROMPT, BLANK, [Sampling(seed=5), Sampling(seed=6)], guidance=2.0)
    alone = drawer().codes(PROMPT, BLANK, [Sampling(seed=6)], guidance=2.0)
    np.testing.assert_array_equal(alone[0], both[1])
    assert (both[0] != both[1]).any()


def test_progress_is_told_row_by_row():
    told = []
    drawer().codes(
        PROMPT, BLANK, [GREEDY], guidance=GUIDANCE, progress=lambda *done: told.append(done)
    )
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_pixels_are_cut_to_whole_numbers():
    codes = np.arange(8, dtype=np.int32).reshape(2, 2, 2)
    found = np.asarray(jax.jit(models()[1].vq.decode)(codes))
    got = drawer().pixels(codes)
    assert got.dtype == np.uint8 and got.shape == (2, 4, 4, 3)
    np.testing.assert_array_equal(got, np.clip((found + 1) / 2 * 255, 0, 255).astype(np.uint8))


def test_a_mesh_draws_the_same():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, n_devices=8)
    placed = (jax.device_put(each, shardings(each, mesh)) for each in models())
    many = Drawer(*placed, GRID, mesh)
    got = many.codes(PROMPT, BLANK, [GREEDY], guidance=GUIDANCE)
    assert got.reshape(-1).tolist() == recomputed(GUIDANCE)
    codes = np.arange(4, dtype=np.int32).reshape(1, 2, 2)
    difference = many.pixels(codes).astype(int) - drawer().pixels(codes)
    assert abs(difference).max() <= 1

"""The tokenizer's losses are those of the papers, and what it learns is kept."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.janus import VqTraining
from dsjax.config.posttraining import TuningConfig
from dsjax.config.vision import VqConfig
from dsjax.janus import tokenizing
from dsjax.janus.pairs import Picture
from dsjax.model.parameters import initialize

VQ = VqConfig(n_codes=6, code_dim=4, latent_channels=8, channels=32, multipliers=(1, 1), n_blocks=1)
CONFIG = VqTraining(
    name="tokenizer",
    vq=VQ,
    size=8,
    train=TuningConfig(
        steps=3, batch_size=4, log_every=1, eval_every=0, checkpoint_every=2, tensorboard=False
    ),
    optim=OptimConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.0),
    precision=PrecisionConfig(compute="float32"),
)


@pytest.fixture(scope="module")
def vq():
    declared = tokenizing.declared_vq(CONFIG)
    vq = initialize(declared, jax.random.key(0))

    def moved(leaf):
        return leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    return jax.tree.map(moved, vq)


def first_vq():
    return initialize(tokenizing.declared_vq(CONFIG), jax.random.key(0))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)


def test_losses_are_distances_to_the_picture_and_to_the_nearest_entry(vq, pixels):
    found = jax.jit(tokenizing.losses)(vq, pixels)
    latents = unit(np.asarray(vq.quant_conv(vq.encoder(jnp.asarray(pixels))), np.float64))
    entries = unit(np.asarray(vq.codebook[...], np.float64))
    distances = np.square(latents[..., None, :] - entries).sum(-1)
    np.testing.assert_array_equal(found.codes, distances.argmin(-1))
    np.testing.assert_array_equal(found.codes, vq.encode(jnp.asarray(pixels)))
    np.testing.assert_allclose(found.codebook, distances.min(-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(found.commitment, distances.min(-1).mean(), rtol=1e-4)
    drawn = np.asarray(vq.decode(found.codes), np.float64)
    np.testing.assert_allclose(found.reconstruction, np.square(drawn - pixels).mean(), rtol=1e-4)


def norms(gradient):
    return {
        name: float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(getattr(gradient, name))))
        for name in ("encoder", "codebook", "decoder")
    }


@pytest.mark.heavy
def test_each_loss_moves_what_it_should(vq, pixels):
    def gradient(name):
        return norms(jax.jit(jax.grad(lambda vq: getattr(tokenizing.losses(vq, pixels), name)))(vq))

    back = gradient("reconstruction")
    # The gradient passes by the choice, so the encoder learns and the entries do not.
    assert back["encoder"] > 0 and back["decoder"] > 0 and back["codebook"] == 0
    entries = gradient("codebook")
    assert entries["codebook"] > 0 and entries["encoder"] == entries["decoder"] == 0
    commitment = gradient("commitment")
    assert commitment["encoder"] > 0 and commitment["codebook"] == commitment["decoder"] == 0


@pytest.fixture
def shown(tmp_path):
    rng = np.random.default_rng(1)
    for number in range(9):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return [Picture(str(tmp_path / f"{number}.png")) for number in range(9)]


def test_first_entries_are_encodings_of_pictures(shown):
    vq = tokenizing.with_entries(first_vq(), shown, 8, seed=3)
    squares = np.stack([tokenizing.square_of(each, 8) for each in shown])
    pixels = jnp.asarray(squares, jnp.float32) / 127.5 - 1
    latents = unit(np.asarray(vq.quant_conv(vq.encoder(pixels)))).reshape(-1, 4)
    entries = np.asarray(vq.codebook[...])
    for entry in entries:
        assert np.abs(latents - entry).max(-1).min() < 1e-5
    # The last one is no nearer to the others than any encoding that was left.
    nearest = np.linalg.norm(latents[:, None] - entries[:-1], axis=-1).min(-1)
    last = np.linalg.norm(entries[:-1] - entries[-1], axis=-1).min()
    assert nearest.max() == pytest.approx(last, rel=1e-4)
    with pytest.raises(ValueError, match=r"1 pictures of 16 codes cannot fill a codebook of 40"):
        many = dataclasses.replace(VQ, n_codes=40)
        tokenizing.with_entries(tokenizing.Vq(many, vq.policy), shown[:1], 8, 0)


def test_autoencoder_draws_what_it_encoded_and_chooses_nothing(vq, pixels):
    found = jax.jit(functools.partial(tokenizing.losses, chooses=False))(vq, pixels)
    latents = unit(np.asarray(vq.quant_conv(vq.encoder(jnp.asarray(pixels)))))
    drawn = np.asarray(vq.decoder(vq.post_quant_conv(jnp.asarray(latents))))
    np.testing.assert_allclose(found.reconstruction, np.square(drawn - pixels).mean(), rtol=1e-4)


@pytest.mark.slow
def test_what_a_run_learns_is_read_back(shown, tmp_path):
    out = Console(file=io.StringIO())
    assert not tokenizing.train(CONFIG, shown, tmp_path / "run", command="x", console=out)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    vq = tokenizing.trained(CONFIG, tmp_path / "run")
    first = tokenizing.with_entries(first_vq(), shown, 8, 0)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), vq, first)
    assert all(jax.tree.leaves(moved))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.vision import VqConfig
from dsjax.model.parameters import shardings
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.vision.vq import Vq, unit
from tests.closeness import LOGITS, assert_close
from tests.vision.test_convolution import noise
from tests.vision.test_projector import random_values

POLICY = Policy(jnp.float32)
CONFIG = VqConfig(
    n_codes=40, code_dim=4, latent_channels=8, channels=32, multipliers=(1, 2), n_blocks=1
)


@pytest.fixture(scope="module")
def vq():
    return random_values(Vq(CONFIG, POLICY))


def test_codes_are_the_nearest_by_angle(vq):
    """Lengths differ by far more than directions, so that neither side's may be left as it is."""
    lengths = np.exp(noise(40, 1, seed=3) * 2)
    vq = jax.tree.map(lambda leaf: leaf, vq)
    vq.codebook[...] = jnp.asarray(noise(40, 4, seed=2) * lengths, jnp.float32)
    pixels = noise(1, 8, 8, 3).clip(-1, 1).astype(np.float32)
    latents = np.asarray(vq.quant_conv(vq.encoder(pixels)), np.float64).reshape(-1, 4)
    entries = np.asarray(vq.codebook[...], np.float64)
    cosines = latents @ entries.T / np.linalg.norm(entries, axis=1)
    got = np.asarray(jax.jit(vq.encode)(pixels))
    assert got.shape == (1, 4, 4) and got.dtype == np.int32
    np.testing.assert_array_equal(got.reshape(-1), cosines.argmax(-1))
    euclidean = ((latents[:, None] - entries[None]) ** 2).sum(-1).argmin(-1)
    assert (euclidean != cosines.argmax(-1)).any()


def test_decoding_reads_directions_alone(vq):
    codes = np.arange(16, dtype=np.int32).reshape(1, 4, 4)
    run = jax.jit(lambda vq, codes: vq.decode(codes))
    want = run(vq, codes)
    assert want.shape == (1, 8, 8, 3) and want.dtype == jnp.float32
    longer = jax.tree.map(lambda leaf: leaf, vq)
    longer.codebook[...] = vq.codebook[...] * 7
    assert_close(run(longer, codes), want, LOGITS)


def test_unit_of_nothing_is_nothing():
    got = unit(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(got, np.zeros((2, 3)))


def test_sharded_equals_one_device(vq):
    mesh = make_mesh({"data": 4, "tensor": 2}, n_devices=8)
    codes = np.random.default_rng(0).integers(0, 40, (4, 4, 4)).astype(np.int32)
    wanted = jax.jit(vq.decode)(codes)
    placed = jax.device_put(vq, shardings(vq, mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda vq, codes: vq.decode(codes))(placed, codes)
    assert_close(got, wanted, LOGITS)

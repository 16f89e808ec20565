import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.vision import VaeConfig
from dsjax.model.parameters import declarations, shardings
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.vision.vae import Vae
from tests.closeness import LOGITS, assert_close
from tests.vision.test_autoencoder import oracle_decoder, oracle_encoder, small
from tests.vision.test_convolution import noise, oracle_conv
from tests.vision.test_projector import random_values

POLICY = Policy(jnp.float32)
CONFIG = VaeConfig(channels=32, multipliers=(1, 2), n_blocks=1, scaling=0.25)


@pytest.fixture(scope="module")
def vae():
    return small(random_values(Vae(CONFIG, POLICY)))


def test_sdxls_has_its_parameters():
    found = [each.count for each in declarations(Vae(VaeConfig(), POLICY))]
    assert (len(found), sum(found)) == (248, 83_653_863)
    decoder = declarations(Vae(VaeConfig(), POLICY).decoder)
    assert sum(each.count for each in decoder) == 49_490_179


def test_encoding_equals_oracle(vae):
    pixels = noise(2, 4, 4, 3)
    moments = oracle_conv(vae.quant_conv, oracle_encoder(vae.encoder, pixels))
    got = jax.jit(vae.encode)(jnp.asarray(pixels, jnp.float32))
    assert_close(got.mean_BYXC, moments[..., :4] * 0.25, LOGITS)
    assert_close(got.std_BYXC, np.exp(moments[..., 4:] / 2) * 0.25, LOGITS)


def test_decoding_equals_oracle(vae):
    latents = noise(2, 2, 2, 4)
    want = oracle_decoder(vae.decoder, oracle_conv(vae.post_quant_conv, latents / 0.25))
    assert_close(jax.jit(vae.decode)(jnp.asarray(latents, jnp.float32)), want, LOGITS)


def test_variances_are_bounded(vae):
    vae = jax.tree.map(lambda leaf: leaf, vae)
    vae.quant_conv.bias[...] = (
        vae.quant_conv.bias[...].at[4:].set(jnp.array([1e3, 1e3, -1e3, -1e3]))
    )
    std = vae.encode(jnp.zeros((1, 4, 4, 3))).std_BYXC
    bounds = np.exp([10, 10, -15, -15]) * 0.25
    np.testing.assert_allclose(std, np.broadcast_to(bounds, std.shape), rtol=1e-6)


def test_sharded_equals_one_device(vae):
    mesh = make_mesh({"data": 4, "tensor": 2}, n_devices=8)
    latents = noise(4, 2, 2, 4).astype(np.float32)
    placed = jax.device_put(vae, shardings(vae, mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda vae, latents: vae.decode(latents))(placed, latents)
    assert_close(got, jax.jit(vae.decode)(latents), LOGITS)

"""What sees and draws, in bfloat16, against itself in float32: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.precision.policy import Policy
from dsjax.vision import sam
from dsjax.vision.autoencoder import Middle
from dsjax.vision.siglip import Siglip
from dsjax.vision.uvit import ConvNext
from tests.closeness import Level, assert_close
from tests.vision import test_sam, test_siglip
from tests.vision.test_autoencoder import small
from tests.vision.test_convolution import noise
from tests.vision.test_projector import random_values

WHOLE = Level("BF16 of several modules", 3e-2)
KINDS = {
    "siglip": (lambda policy: Siglip(test_siglip.CONFIG, policy), test_siglip.pixels()),
    "sam": (lambda policy: sam.Attention(test_sam.CONFIG, 3, policy), noise(2, 3, 3, 16)),
    "autoencoder": (lambda policy: Middle(32, 32, policy), noise(2, 3, 3, 32)),
    "uvit": (lambda policy: ConvNext(8, 12, 1e-6, policy), noise(2, 4, 3, 8), noise(2, 12, seed=5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(kind):
    make, *inputs = KINDS[kind]

    def run(dtype):
        module = small(random_values(make(Policy(dtype))))

        def total(module):
            out = module(*(jnp.asarray(x, dtype) for x in inputs))
            wave = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return (out.astype(jnp.float32) * wave).sum(), out

        gradients, out = jax.jit(jax.grad(total, has_aux=True))(module)
        return out, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])

    for name, got, want in zip(
        ("out", "gradient"), run(jnp.bfloat16), run(jnp.float32), strict=True
    ):
        assert_close(got, want, WHOLE, name)

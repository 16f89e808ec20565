"""What is stored of a picture are the VAE's means and deviations, of its middle square."""

import jax
import numpy as np
import PIL.Image

from dsjax.checkpoint.vae import load_vae, open_vae
from dsjax.janus.latents import latents_of
from dsjax.janus.pairs import Picture
from tests.checkpoint.test_vae import tensors, write


def test_latents_are_those_of_each_picture_alone(tmp_path):
    vae = load_vae(open_vae(write(tmp_path / "vae", tensors())))
    rng, shown = np.random.default_rng(0), []
    for number in range(5):  # more than are encoded together
        pixels = rng.integers(0, 256, (8, 8 + number, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        shown.append(Picture(str(tmp_path / f"{number}.png")))
    found = latents_of(shown, vae, 2, tmp_path / "cache")
    assert found.shape == (5, 2, 4, 4, 4) and found.dtype == np.float32
    encode = jax.jit(lambda vae, pixels: vae.encode(pixels))
    for number, own in enumerate(found):
        left = number // 2
        pixels = np.asarray(PIL.Image.open(shown[number].path), np.float32)[:, left : left + 8]
        want = encode(vae, pixels[None] / 127.5 - 1)
        np.testing.assert_allclose(own[0], want.mean_BYXC[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(own[1], want.std_BYXC[0], rtol=1e-4)
        assert own[0].std() > 0.01

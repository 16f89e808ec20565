"""The quantiser against torch's own float8_e4m3fn, live."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from dsjax.precision.fp8 import quantize_block

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("kind", ["fp32", "pow2"])
@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128)], ids=str)
def test_quantize_equals_torch(block, kind):
    torch = importlib.import_module("torch")
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(256, 512)) * np.exp2(rng.uniform(-12, 9, (256, 1)))).astype(np.float32)
    r, c = block
    tiles = torch.from_numpy(x).reshape(256 // r, r, 512 // c, c)
    scales = tiles.abs().amax((1, 3), keepdim=True).clamp(1e-4) / 448.0
    if kind == "pow2":
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    values = (tiles / scales).clamp(-448, 448).to(torch.float8_e4m3fn).reshape(256, 512)

    quantized = quantize_block(x, block, kind)
    np.testing.assert_array_equal(quantized.scales, scales[:, 0, :, 0].numpy())
    got = np.asarray(quantized.values).view(np.uint8)
    np.testing.assert_array_equal(got, values.view(torch.uint8).numpy())
    dequantized = (values.float().reshape(tiles.shape) * scales).reshape(256, 512)
    np.testing.assert_array_equal(quantized.dequantize(), dequantized.numpy())


def test_every_code_means_what_it_means_to_torch():
    torch = importlib.import_module("torch")
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    finite = np.nan_to_num(numbers, nan=448.0).reshape(2, 128)
    quantized = quantize_block(finite, (1, 128))
    np.testing.assert_array_equal(quantized.scales, 1)
    want = torch.from_numpy(finite).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(np.asarray(quantized.values).view(np.uint8), want)

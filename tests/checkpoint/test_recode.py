"""Element types: what each choice stores, conversions both ways, and numbers that are none."""

import ml_dtypes
import numpy as np
import pytest

from dsjax.checkpoint import names, recode
from dsjax.checkpoint.hf_config import from_hf
from dsjax.checkpoint.hf_folder import FLOAT32, FP8
from dsjax.checkpoint.recode import BFLOAT16, Stored, cast_rows, check_choice, is_finite
from tests import closeness
from tests.golden.cases import V3

TENSORS = {
    tensor.name.removeprefix("model.layers.1."): tensor
    for tensor in names.tensors(from_hf(V3), "deepseek_v3")
}
UP, NORM, BIAS = (
    TENSORS[name]
    for name in (
        "mlp.experts.0.up_proj.weight",
        "input_layernorm.weight",
        "mlp.gate.e_score_correction_bias",
    )
)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("choice", "tensor", "current", "stored"),
    [
        ("keep", UP, FP8, FP8),
        ("keep", UP, BFLOAT16, BFLOAT16),
        ("keep", NORM, np.dtype(np.float16), np.dtype(np.float16)),
        ("keep", BIAS, BFLOAT16, FLOAT32),
        ("bfloat16", UP, FP8, BFLOAT16),
        ("bfloat16", BIAS, FLOAT32, FLOAT32),
        ("float32", NORM, BFLOAT16, FLOAT32),
        ("fp8", UP, BFLOAT16, FP8),
        ("fp8", NORM, FLOAT32, BFLOAT16),
        ("fp8", TENSORS["lm_head.weight"], FP8, FP8),
        ("fp8", BIAS, FLOAT32, FLOAT32),
    ],
)
def test_choice_decides_what_is_stored(choice, tensor, current, stored):
    assert recode.stored_dtype(choice, tensor, current) == stored


def test_choice_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--dtype int4 is not one of keep, bfloat16, float32, fp8"):
        check_choice("int4")


def test_recode_leaves_the_same_dtype_alone():
    stored = Stored(RNG.normal(size=(4, 6)).astype(FP8), np.ones((1, 1), np.float32))
    assert recode.recode(stored, FP8, (128, 128)) is stored


def test_recode_multiplies_by_the_scale_of_the_block():
    values = RNG.normal(size=(5, 7)).astype(FP8)
    scales = RNG.uniform(0.5, 2, (3, 2)).astype(np.float32)
    spread = np.repeat(np.repeat(scales, 2, 0), 4, 1)[:5, :7]
    exact = values.astype(np.float32) * spread
    for dtype in (FLOAT32, BFLOAT16):
        made = recode.recode(Stored(values, scales), dtype, (2, 4))
        assert made.scales is None and made.values.dtype == dtype
        np.testing.assert_array_equal(made.values, exact.astype(dtype))


def test_recode_quantizes_with_a_scale_a_block():
    weight = (RNG.normal(size=(40, 24)) * 3).astype(BFLOAT16)
    made = recode.recode(Stored(weight), FP8, (16, 16))
    assert made.values.dtype == FP8 and made.scales.shape == (3, 2)
    back = recode.recode(made, FLOAT32, (16, 16))
    closeness.assert_close(back.values, weight.astype(np.float32), closeness.FP8)
    again = recode.recode(Stored(back.values), FP8, (16, 16))
    np.testing.assert_array_equal(again.values.view(np.uint8), made.values.view(np.uint8))


def test_recode_keeps_subnormals():
    """They are zero to a matrix unit, but not in a round trip through float32."""
    weight = np.arange(1, 128, dtype=np.uint16).view(BFLOAT16)
    there = recode.recode(Stored(weight), FLOAT32, (128, 128))
    back = recode.recode(there, BFLOAT16, (128, 128))
    np.testing.assert_array_equal(back.values.view(np.uint16), weight.view(np.uint16))


def test_rows_are_cast_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(recode, "_CAST_TOGETHER", 60)
    source, asked = RNG.normal(size=(10, 5)).astype(BFLOAT16), []

    def read(rows):
        asked.append((rows.start, rows.stop))
        return source[rows]

    made = cast_rows(read, source.shape, FLOAT32)
    assert asked == [(0, 3), (3, 6), (6, 9), (9, 10)]
    np.testing.assert_array_equal(made, source.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, FP8], ids=str)
def test_finite_agrees_with_numpy_on_every_pattern(dtype):
    dtype = np.dtype(dtype)
    bits = np.arange(256, dtype=np.uint8)
    if dtype.itemsize > 1:
        bits = np.arange(1 << 16, dtype=np.uint16)
    if dtype.itemsize > 2:
        bits = bits.astype(np.uint32) << 16
    values = bits.view(dtype)
    for value in values[:: max(1, len(values) // 2048)]:
        assert is_finite(value.reshape(1)) == np.isfinite(value.astype(np.float32))
    finite = values[np.isfinite(values.astype(np.float32))]
    assert is_finite(finite) and not is_finite(values)


@pytest.mark.parametrize("at", [0, 65535, 65536, 199_999])
def test_finite_looks_everywhere(at):
    values = np.zeros((2, 100_000), np.float32)
    assert is_finite(values)
    values.flat[at] = -np.inf
    assert not is_finite(values)

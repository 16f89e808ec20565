"""The element types that a conversion stores weights in, and conversions between them.

`keep` leaves each tensor as it is; `bfloat16` and `float32` give plain arrays; `fp8` is the layout
that DeepSeek publishes: the linear weights of a layer in E4M3 with one float32 scale per block, the
rest in bfloat16. The router's bias and an indexer's norm are float32 in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dsjax.checkpoint.fingerprint import EXPONENT
from dsjax.checkpoint.hf_folder import FLOAT32, FP8
from dsjax.checkpoint.names import Tensor
from dsjax.precision.fp8 import WEIGHT_BLOCK, BlockScaled, Scale, quantize_block

CHOICES = ("keep", "bfloat16", "float32", "fp8")
INT64 = np.dtype(np.int64)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BLOCK = WEIGHT_BLOCK

_SCANNED_TOGETHER = 1 << 16  # elements; small enough for what is made of them to stay in cache
_CAST_TOGETHER = 64 << 20  # bytes


class Stored(NamedTuple):
    """A tensor as stored: FP8 values with their scales, or plain values."""

    values: np.ndarray
    scales: np.ndarray | None = None


def check_choice(choice: str) -> None:
    if choice not in CHOICES:
        raise ValueError(f"--dtype {choice} is not one of {', '.join(CHOICES)}")


def stored_dtype(choice: str, tensor: Tensor, current: np.dtype) -> np.dtype:
    """Returns the dtype to store `tensor` in; `current` is the dtype that it has now."""
    if tensor.integer:
        return INT64
    if tensor.keep_float32:
        return FLOAT32
    if choice == "fp8":
        return FP8 if tensor.quantized or current == FP8 else BFLOAT16
    return {"keep": current, "bfloat16": BFLOAT16, "float32": FLOAT32}[choice]


def recode(
    stored: Stored, dtype: np.dtype, block: tuple[int, int], scale: Scale = "fp32"
) -> Stored:
    """Converts between FP8 with scales and plain floats; the same dtype returns the input.

    Args:
      scale: the kind of scales that new FP8 values get.
    """
    if stored.values.dtype == dtype:
        return stored
    if dtype == FP8:
        quantized = quantize_block(stored.values, block, scale)
        return Stored(np.asarray(quantized.values), np.asarray(quantized.scales))
    if stored.scales is not None:
        scaled = BlockScaled(stored.values, stored.scales, block)  # pyright: ignore[reportArgumentType]
        return Stored(np.asarray(scaled.dequantize(dtype)))
    return Stored(stored.values.astype(dtype))


def cast_rows(
    read: Callable[[slice], np.ndarray], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Reads a plain array into another dtype, a few rows at a time.

    Holding an embedding in both dtypes at once would take gigabytes.
    """
    result = np.empty(shape, dtype)
    step = max(1, _CAST_TOGETHER // max(result[:1].nbytes, 1))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        result[rows] = read(rows)
    return result


def is_finite(values: np.ndarray) -> bool:
    """Tells whether a C-contiguous array is free of NaN and infinity, as integers are."""
    if values.dtype.kind in "iu":
        return True
    exponent = EXPONENT[values.dtype]
    bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    pieces = (
        bits[start : start + _SCANNED_TOGETHER] & exponent
        for start in range(0, bits.size, _SCANNED_TOGETHER)
    )
    return not any((piece == exponent).any() for piece in pieces)

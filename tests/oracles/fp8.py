"""Block-scaled FP8 from its definition, one block at a time, every E4M3 number from its bits.

Sources: DeepSeek-V3 (arXiv:2412.19437) section 3.3; the E4M3 format of arXiv:2209.05433. Nothing
here knows of ml_dtypes or JAX: the nearest number is searched among all 256.
"""

from __future__ import annotations

import math

import numpy as np


def _value(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if sign else size


VALUES = np.array([_value(code) for code in range(256)])  # float64, by code
_SIZES = VALUES[:127]  # 0 to 448, rising with the code


def encode(x: np.ndarray) -> np.ndarray:
    """uint8 codes of the nearest E4M3 numbers, ties to the even code; beyond 448 stays 448."""
    sizes = np.minimum(np.abs(x.astype(np.float64)), 448.0)
    above = np.clip(np.searchsorted(_SIZES, sizes), 1, 126)
    up, down = _SIZES[above] - sizes, sizes - _SIZES[above - 1]
    odd_above = above % 2 == 1
    codes = np.where((up < down) | ((up == down) & ~odd_above), above, above - 1)
    codes = np.where(np.isnan(x), 127, codes)
    return (codes + 128 * np.signbit(x)).astype(np.uint8)


def quantize(x: np.ndarray, block: tuple[int, int], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 and scales float32 of the last two dimensions of a float32 array."""
    codes = np.empty(x.shape, np.uint8)
    r, c = block
    scales = np.empty((*x.shape[:-2], -(-x.shape[-2] // r), -(-x.shape[-1] // c)), np.float32)
    for *leading, i, j in np.ndindex(scales.shape):
        where = (*leading, slice(i * r, i * r + r), slice(j * c, j * c + c))
        tile = x[where]
        finite = tile[np.isfinite(tile)]
        amax = np.max(np.abs(finite), initial=np.float32(1e-4))
        if kind == "pow2":
            exponent = -200
            while 448 * 2.0**exponent < float(amax):
                exponent += 1
            scale = np.float32(2.0**exponent)
        else:
            scale = np.float32(amax) / np.float32(448)
        scales[(*leading, i, j)] = scale
        with np.errstate(invalid="ignore", over="ignore"):
            codes[where] = encode(np.where(np.isfinite(tile), tile, np.float32(np.nan)) / scale)
    return codes, scales


def dequantize(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float32 values * scales."""
    spread = np.repeat(np.repeat(scales, block[0], axis=-2), block[1], axis=-1)
    spread = spread[..., : codes.shape[-2], : codes.shape[-1]]
    return VALUES[codes].astype(np.float32) * spread


def e5m6_values() -> np.ndarray:
    """float64 [4096], by code: sign, five exponent bits with bias 15, six mantissa bits."""
    values = np.empty(4096)
    for code in range(4096):
        exponent, mantissa = code >> 6 & 31, code & 63
        if exponent == 31:
            size = math.nan if mantissa else math.inf
        elif exponent == 0:
            size = mantissa * 2.0**-20
        else:
            size = (64 + mantissa) * 2.0 ** (exponent - 21)
        values[code] = -size if code >> 11 else size
    return values


def e5m6_encode(x: np.ndarray) -> np.ndarray:
    """uint16 codes of the finite E5M6 numbers nearest to x, at most 65024 in size; ties to even."""
    sizes = e5m6_values()[: 31 << 6]
    above = np.clip(np.searchsorted(sizes, np.abs(x)), 1, len(sizes) - 1)
    up, down = sizes[above] - np.abs(x), np.abs(x) - sizes[above - 1]
    codes = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return (codes + 2048 * np.signbit(x)).astype(np.uint16)

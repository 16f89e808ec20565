"""How close two arrays must be: one measure, relative L2 in float64, at named levels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Level(NamedTuple):
    """A bound on the relative L2 error; 0 means bitwise."""

    name: str
    bound: float


EXACT = Level("EXACT", 0.0)  # round trips, ids, packing, schedules
F32 = Level("F32", 1e-5)  # one module in float32 against an oracle
LOGITS = Level("LOGITS", 1e-4)  # a whole model in float32 against a reference
BF16 = Level(
    "BF16", 1e-2
)  # one module in bfloat16 against a float32 oracle; rounding alone gives 3e-3 to 4e-3
FP8 = Level("FP8", 4.5e-2)  # one block-scaled FP8 GEMM; rounding alone gives 3.7e-2

# A row may be this much worse than the whole: one lost row among 1e5 hides in the whole (3e-3), not
# here (1.0).
WORST_ROW_FACTOR = 10.0


def relative_l2(got: Any, want: Any) -> float:
    """Returns |got - want| / |want| in float64, the norms being over all elements."""
    got_64, want_64 = _float64(got), _float64(want)
    error, size = np.linalg.norm(got_64 - want_64), np.linalg.norm(want_64)
    return float(error) if size == 0 else float(error / size)


def worst_row(got: Any, want: Any) -> tuple[int, float]:
    """Returns the index of the worst row (last axis) and its relative L2.

    A row's error is measured against the larger of its own norm and the typical row's, so that a
    row of near zeros is not held to more digits than it has.
    """
    got_64, want_64 = (np.atleast_2d(_float64(array)) for array in (got, want))
    got_64, want_64 = (array.reshape(-1, array.shape[-1]) for array in (got_64, want_64))
    if not want_64.size:
        return 0, 0.0
    sizes = np.linalg.norm(want_64, axis=-1)
    typical = np.sqrt(np.mean(sizes**2))
    scales = np.maximum(sizes, typical) if typical > 0 else 1.0
    errors = np.linalg.norm(got_64 - want_64, axis=-1) / scales
    row = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    return row, float(errors[row])


def assert_close(got: Any, want: Any, level: Level = F32, name: str = "array") -> None:
    """Asserts that `got` is as close to `want`, the more trusted one, as `level` asks."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, want {want.shape}"
    if level.bound == 0:
        _assert_same_bits(got, want, name)
        return
    error = relative_l2(got, want)
    row, row_error = worst_row(got, want)
    close = error <= level.bound and row_error <= WORST_ROW_FACTOR * level.bound
    largest = np.max(np.abs(_float64(got) - _float64(want)), initial=0.0)
    assert close, (
        f"{name}: relative L2 {error:.3e} (worst row {row}: {row_error:.3e}, max abs "
        f"{largest:.3e}) exceeds {level.name} {level.bound:.1e}; {got.dtype} against "
        f"{want.dtype}, shape {got.shape}"
    )


def _assert_same_bits(got: np.ndarray, want: np.ndarray, name: str) -> None:
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, want {want.dtype}"
    if got.tobytes() == want.tobytes():
        return
    flat_got, flat_want = (
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(got.size, -1)
        for array in (got, want)
    )
    differs = np.any(flat_got != flat_want, axis=-1)
    first = np.unravel_index(int(np.argmax(differs)), got.shape)
    at = tuple(map(int, first))
    raise AssertionError(
        f"{name}: {int(differs.sum())} of {got.size} elements differ in their bits; the first is "
        f"{at}: {got[at]!r}, want {want[at]!r}"
    )


def _float64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)

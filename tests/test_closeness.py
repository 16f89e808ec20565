"""The measure itself: what it lets pass, what it must not, and what it says."""

import ml_dtypes
import numpy as np
import pytest

from tests.closeness import BF16, EXACT, F32, assert_close, relative_l2, worst_row

WANT = np.random.default_rng(0).normal(size=(1000, 64))


def test_relative_l2_of_scaled_array():
    assert relative_l2(1.5 * WANT, WANT) == pytest.approx(0.5)
    assert relative_l2(np.ones(4), np.zeros(4)) == 2.0


def test_rounding_passes_its_level_and_not_the_next():
    assert_close(WANT.astype(np.float32), WANT, F32)
    rounded = WANT.astype(ml_dtypes.bfloat16)
    assert_close(rounded, WANT, BF16)
    with pytest.raises(AssertionError, match=r"y: relative L2 1\.\d+e-03 .* exceeds F32 1\.0e-05"):
        assert_close(rounded, WANT, F32, "y")


def test_one_lost_row_fails_where_the_whole_would_pass():
    want = np.tile(WANT, (50, 1))
    got = want.copy()
    got[123] = 0
    assert relative_l2(got, want) < BF16.bound
    assert worst_row(got, want) == (123, pytest.approx(1.0, abs=0.2))
    with pytest.raises(AssertionError, match="worst row 123"):
        assert_close(got, want, BF16)


def test_row_of_near_zeros_is_measured_against_the_typical_row():
    want, got = WANT.copy(), WANT.copy()
    want[5], got[5] = 1e-9, 2e-9
    assert_close(got, want, F32)


def test_nan_and_shape_fail():
    got = WANT.copy()
    got[3, 4] = np.nan
    with pytest.raises(AssertionError, match="worst row 3"):
        assert_close(got, WANT, BF16)
    with pytest.raises(AssertionError, match=r"logits: shape \(64,\), want \(1000, 64\)"):
        assert_close(WANT[0], WANT, BF16, "logits")


def test_exact_compares_bits():
    want = np.array([[0.0, np.nan], [1.0, 2.0]], np.float32)
    assert_close(want.copy(), want, EXACT)
    got = want.copy()
    got[0, 0] = -0.0
    with pytest.raises(AssertionError, match=r"1 of 4 elements differ .* first is \(0, 0\)"):
        assert_close(got, want, EXACT)
    with pytest.raises(AssertionError, match="dtype float64, want float32"):
        assert_close(want.astype(np.float64), want, EXACT)


def test_zeros_equal_zeros():
    assert_close(np.zeros((2, 3)), np.zeros((2, 3)), F32)
    assert_close(np.zeros((0, 3)), np.zeros((0, 3)), F32)

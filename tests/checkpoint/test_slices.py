"""Slices of a leaf: the same numbers as of the whole array, and no more is read than they need."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.checkpoint import slices
from dsjax.checkpoint.slices import Dequantized, Leaf, dequantize_rows, read_slice, transpose_into
from tests.closeness import EXACT, assert_close

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)


class InMemory:
    """The tensors of a leaf, cut out of the leaf; remembers what was read."""

    def __init__(self, array: np.ndarray, slot_rank: int, transpose: bool):
        self.leaf = Leaf(array.shape, array.dtype, slot_rank, transpose)
        self.reads: list[tuple[tuple[int, ...], int, int]] = []
        self._array = array

    def rows(self, slot: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        self.reads.append((slot, start, stop))
        tensor = self._array[slot]
        return (tensor.T if self.leaf.transpose else tensor)[start:stop]


def normal(*shape: int, dtype: np.dtype = FLOAT32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """Four rows of the tensors here, so that a slice takes several blocks."""
    monkeypatch.setattr(slices, "BLOCK_BYTES", 96)


@st.composite
def sliced_leaves(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    slot_rank = draw(st.integers(max(len(shape) - 2, 0), len(shape) - 1))
    index = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        whole = draw(st.booleans())
        index.append(draw(st.sampled_from([start, slice(start, size), slice(0, start + 1)])))
        index[-1] = slice(None) if whole else index[-1]
    transpose = len(shape) - slot_rank == 2 and draw(st.booleans())
    return normal(*shape), slot_rank, transpose, tuple(index)


@settings(max_examples=60, deadline=None)
@given(sliced_leaves())
def test_slice_equals_that_of_the_array(case):
    array, slot_rank, transpose, index = case
    whole_blocks = slices.BLOCK_BYTES
    slices.BLOCK_BYTES = 40
    try:
        got = read_slice(InMemory(array, slot_rank, transpose), index, FLOAT32)
    finally:
        slices.BLOCK_BYTES = whole_blocks
    assert_close(got, array[index], EXACT)


@pytest.mark.parametrize(
    ("transpose", "rows"), [(True, [(4, 8), (8, 9)]), (False, [(1, 5)])], ids=["turned", "as it is"]
)
def test_slice_reads_only_its_slots_and_rows(small_blocks, transpose, rows):
    tensors = InMemory(normal(2, 3, 6, 10) if transpose else normal(2, 3, 10, 6), 2, transpose)
    read_slice(tensors, (1, slice(2, 3), slice(1, 5), slice(4, 9)), FLOAT32)
    assert sorted(tensors.reads) == [((1, 2), *some) for some in rows]


def test_slice_is_cast(small_blocks):
    array = normal(3, 5, 6)
    got = read_slice(InMemory(array, 1, True), (slice(None),) * 3, BFLOAT16)
    assert_close(got, array.astype(BFLOAT16), EXACT)


def test_slice_passes_a_failure_on(small_blocks):
    tensors = InMemory(normal(3, 5, 6), 1, True)

    def fail(*_):
        raise ValueError("a broken disk")

    tensors.rows = fail
    with pytest.raises(ValueError, match="a broken disk"):
        read_slice(tensors, (slice(None),) * 3, FLOAT32)


@pytest.mark.parametrize("start", [0, 3, 4, 9])
def test_dequantized_rows_use_the_scales_of_their_place_in_the_tensor(start):
    """Blocks of 4 by 3 rows and columns on a tensor of 10 by 7, its edges ragged."""
    values = normal(10, 7, dtype=E4M3)
    scales = np.random.default_rng(1).uniform(1e-3, 1, (3, 3)).astype(np.float32)
    whole = np.repeat(np.repeat(scales, 4, axis=0), 3, axis=1)[:10, :7] * values.astype(FLOAT32)
    for stop in range(start + 1, 11):
        rows = scales[start // 4 : -(-stop // 4)]
        got = dequantize_rows(values[start:stop], rows, start, (4, 3))
        assert_close(got, whole[start:stop], EXACT)


def test_dequantized_slice_equals_that_of_the_whole(small_blocks):
    values = normal(2, 7, 10, dtype=E4M3)
    scales = np.random.default_rng(1).uniform(1e-3, 1, (2, 3, 3)).astype(np.float32)
    whole = np.repeat(np.repeat(scales, 3, axis=1), 4, axis=2)[:, :7, :10] * values.astype(FLOAT32)
    tensors = Dequantized(InMemory(values, 1, True), InMemory(scales, 1, True), (4, 3))
    assert tensors.leaf.dtype == FLOAT32
    index = (slice(0, 2), slice(2, 6), slice(3, 10))
    assert_close(read_slice(tensors, index, FLOAT32), whole[index], EXACT)


@pytest.mark.parametrize("rows", [1, 16, 40])
def test_transpose_equals_that_of_numpy(rows):
    array, target = normal(rows, 5), np.zeros((5, rows), np.float32)
    transpose_into(target, array)
    assert_close(target, array.T, EXACT)

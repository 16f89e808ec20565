"""What the model reads of tokens, and that it is laid out once."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.inputs import read_tokens, shift_left

TOKENS = jnp.asarray([[5, 6, 7, 8, 9, 4]], jnp.int32)
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0]], jnp.int32)


def test_shift_left_takes_what_is_further_on():
    np.testing.assert_array_equal(shift_left(TOKENS, 1), [[6, 7, 8, 9, 4, 0]])
    np.testing.assert_array_equal(shift_left(TOKENS, 3), [[8, 9, 4, 0, 0, 0]])


def test_isolated_documents_have_their_own_positions():
    got = read_tokens(TOKENS, SEGMENTS, isolate=True, n_mtp=2)
    np.testing.assert_array_equal(got.tokens, TOKENS)
    np.testing.assert_array_equal(got.positions, [[0, 1, 2, 0, 1, 0]])
    np.testing.assert_array_equal(got.segment_ids, SEGMENTS)
    np.testing.assert_array_equal(got.documents, SEGMENTS)
    np.testing.assert_array_equal(got.ahead.tokens, [[[6, 7, 8, 9, 4, 0]], [[7, 8, 9, 4, 0, 0]]])
    # A module's position counts while the token that it reads is of the same document.
    np.testing.assert_array_equal(got.ahead.documents, [[[1, 1, 0, 2, 0, 0]], [[1, 0, 0, 0, 0, 0]]])


@pytest.mark.parametrize("segments", [SEGMENTS, None])
def test_documents_that_are_not_isolated_are_one(segments):
    got = read_tokens(TOKENS, segments, isolate=segments is None, n_mtp=1)
    ones = [[1, 1, 1, 1, 1, 0]] if segments is not None else [[1] * 6]
    np.testing.assert_array_equal(got.positions, [[0, 1, 2, 3, 4, 5]])
    assert got.segment_ids is None
    np.testing.assert_array_equal(got.documents, ones)
    last = [[1, 1, 1, 1, 0, 0]] if segments is not None else [[1] * 5 + [0]]
    np.testing.assert_array_equal(got.ahead.documents, [last])
    assert read_tokens(TOKENS, segments, isolate=False, n_mtp=0).ahead is None


def test_micro_batches_are_read_at_once():
    stacked = (jnp.stack([x, x[:, ::-1]]) for x in (TOKENS, SEGMENTS))
    got = read_tokens(*stacked, isolate=True, n_mtp=1)
    want = read_tokens(TOKENS[:, ::-1], SEGMENTS[:, ::-1], isolate=True, n_mtp=1)
    np.testing.assert_array_equal(got.positions[1], want.positions)
    np.testing.assert_array_equal(got.ahead.tokens[1], want.ahead.tokens)
    np.testing.assert_array_equal(got.ahead.documents[1], want.ahead.documents)


def test_a_masked_token_keeps_its_place_and_is_of_no_document():
    segments = jnp.asarray([[1, -1, -1, 1, 2, 0]], jnp.int32)
    got = read_tokens(TOKENS, segments, isolate=True, n_mtp=0)
    np.testing.assert_array_equal(got.positions, [[0, 1, 2, 3, 0, 0]])
    np.testing.assert_array_equal(got.segment_ids, segments)
    np.testing.assert_array_equal(got.documents, [[1, 0, 0, 1, 2, 0]])

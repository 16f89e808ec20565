"""Sides of the split: copies stay together, and neither side is empty."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.data import splitting
from dsjax.data.shuffling import mix
from dsjax.data.splitting import HELDOUT, LEFT_OUT, TRAIN

NUMBERS = np.arange(3000, dtype=np.uint64)
POSITIONS = mix(1, NUMBERS)


def test_digest_goes_by_words():
    assert splitting.digest("one  two\n") == splitting.digest("\tone two") < 1 << 64
    assert splitting.digest("one two") != splitting.digest("onetwo")


@given(st.text(st.sampled_from("ab \n"), max_size=12), st.integers(1, 5))
def test_digest_is_the_same_in_pieces_of_any_size(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "_PIECE", size)
        found = splitting.digest_bytes(text, 16)
    words = " ".join(text.split()).encode()
    assert found == hashlib.blake2b(words, digest_size=16).digest()


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=30).filter(lambda each: len(set(each)) > 1),
    st.sampled_from([1e-9, 0.05, 0.5, 1 - 1e-9]),
)
def test_copies_are_on_one_side_and_both_sides_have_some(texts, fraction):
    digests = mix(2, np.array(texts, np.uint64))
    sides = splitting.by_fraction(POSITIONS[: len(texts)], digests, fraction)
    assert set(sides.tolist()) == {TRAIN, HELDOUT}
    for text in set(texts):
        assert len(set(sides[np.array(texts) == text].tolist())) == 1


def test_fraction_is_of_groups_and_texts_without_copies_go_by_position():
    digests = mix(3, NUMBERS)
    alone = splitting.by_fraction(POSITIONS, digests, 0.1) == HELDOUT
    np.testing.assert_array_equal(alone, POSITIONS < 0.1 * 2.0**64)
    digests = mix(3, NUMBERS // np.uint64(100))  # 30 texts, 100 times each
    held = splitting.by_fraction(POSITIONS, digests, 0.1).reshape(30, 100) == HELDOUT
    assert 0 < held[:, 0].sum() < 9  # not nearly all, as if any copy could take the others along


def test_copies_do_not_move_other_documents():
    digests = mix(3, NUMBERS)
    before = splitting.by_fraction(POSITIONS, digests, 0.1)
    digests[7] = digests[8]
    after = splitting.by_fraction(POSITIONS, digests, 0.1)
    assert set(np.flatnonzero(before != after)) <= {7, 8}


@pytest.mark.parametrize(
    ("held", "digests", "sides"),
    [
        ([0, 0, 1], [1, 2, 3], [TRAIN, TRAIN, HELDOUT]),
        ([0, 0, 1], [1, 3, 3], [TRAIN, LEFT_OUT, HELDOUT]),
        ([0, 1, 1], [1, 3, 3], [TRAIN, HELDOUT, HELDOUT]),
    ],
)
def test_copies_of_heldout_files_are_left_out(held, digests, sides):
    got = splitting.by_file(np.array(held, bool), np.array(digests, np.uint64))
    assert got.tolist() == sides and got.dtype == np.uint8

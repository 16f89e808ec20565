"""Which documents stay."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.curate import duplicates
from dsjax.curate.duplicates import NONE


def test_first_in_order_of_equal_documents_stays():
    digests = np.array([5, 7, 5, 7, 9, 5])
    order = np.array([3, 2, 0, 4, 1])  # the last takes no part
    assert duplicates.exact(digests, order).tolist() == [2, 3, NONE, NONE, NONE, NONE]


def test_buckets_number_what_is_shared():
    bands = np.array([[1, 5], [1, 6], [2, 6], [3, 7]], np.uint64)
    found = duplicates.buckets(bands)
    assert (found != NONE).tolist() == [[True, False], [True, True], [False, True], [False] * 2]
    assert found[0, 0] == found[1, 0] and found[1, 1] == found[2, 1]


def near(sets, threshold=0.5):
    """All documents share one band, and signatures say nothing."""

    def similarity(one, other):
        return len(sets[one] & sets[other]) / len(sets[one] | sets[other])

    shared = np.zeros((len(sets), 1), np.int64)
    signatures = np.zeros((len(sets), 4), np.uint32)
    return duplicates.near(shared, signatures, threshold, similarity)


def test_chain_keeps_what_is_unlike_all_that_stays():
    chain = [set(range(n, n + 9)) for n in (0, 3, 6, 9)]  # neighbours have 0.5, others less
    assert near(chain) == [(1, 0, 0.5), (3, 2, 0.5)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.frozensets(st.integers(0, 9), min_size=1), min_size=1, max_size=12))
def test_removed_are_like_one_that_stays_and_no_two_that_stay_are_alike(sets):
    removed = near(sets)
    gone = {document for document, _, _ in removed}
    for document, keeper, similarity in removed:
        alike = len(sets[document] & sets[keeper]) / len(sets[document] | sets[keeper])
        assert keeper not in gone and keeper < document and similarity == alike >= 0.5
    staying = [n for n in range(len(sets)) if n not in gone]
    for one in staying:
        for other in staying:
            alike = len(sets[one] & sets[other]) / len(sets[one] | sets[other])
            assert one == other or alike < 0.5


def test_documents_without_a_band_in_common_are_not_compared():
    shared = np.array([[0, NONE], [NONE, 0], [NONE, NONE]])
    signatures = np.zeros((3, 4), np.uint32)
    assert duplicates.near(shared, signatures, 0.5, lambda one, other: 1.0) == []


def test_shared_band_is_no_proof():
    shared = np.zeros((2, 1), np.int64)
    far = np.array([[1] * 10, [2] * 10], np.uint32)
    asked = []
    assert duplicates.near(shared, far, 0.8, lambda *pair: asked.append(pair) or 1.0) == []
    assert asked == []
    assert duplicates.near(shared, far * 0, 0.8, lambda *pair: 0.79) == []

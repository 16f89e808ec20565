"""Mixtures have their shares, lose and double no row, and are found by number alone."""

import collections
import dataclasses

import numpy as np
import pytest

from dsjax.data.loader import Loader
from dsjax.data.mixture import BLOCK, MixedRows
from dsjax.data.packing import PackedSequences
from tests.data.test_packing import SPECIAL, make_documents


def mixed(weights, *, seed=0, fingerprint="fingerprint"):
    parts = []
    for index, length in enumerate((30, 50, 200)[: len(weights)]):
        documents = make_documents([length] * 3, first=10 + 700 * index)
        documents = dataclasses.replace(documents, fingerprint=fingerprint)
        parts.append(PackedSequences(documents, SPECIAL, sequence_length=8, seed=seed))
    return MixedRows(parts, weights, seed=seed)


@pytest.mark.parametrize("weights", [(1,), (0.7, 0.3), (5, 1, 4), (1, 1e-4, 1)])
def test_every_part_gives_its_rows_in_order_and_its_share(weights):
    rows, count = mixed(weights), 4 * BLOCK
    places = [rows.place(row) for row in range(count)]
    found = collections.defaultdict(set)
    for part, own in places:
        found[part].add(own)
    for part, (share, taken) in enumerate(zip(rows.shares, rows.counts(count), strict=True)):
        assert found[part] == set(range(taken)) and abs(taken - share * count) < len(weights) + 1e-3
    assert sum(map(len, found.values())) == count  # none twice


def test_shares_hold_over_short_stretches_in_random_order():
    rows = mixed((0.75, 0.25))
    parts = np.array([rows.place(row)[0] for row in range(BLOCK)])
    assert parts.sum() == BLOCK // 4
    by_batch = parts.reshape(-1, 64).sum(axis=1)
    assert 8 < by_batch.min() < by_batch.max() < 26 and len(set(by_batch.tolist())) > 3


def test_rows_are_those_of_their_parts():
    rows = mixed((2, 1))
    for row in (0, 5, 999, 100_000_000_000):
        part, own = rows.place(row)
        want = rows.parts[part][own]["tokens"]
        np.testing.assert_array_equal(rows[row]["tokens"], want)
        body = want[want >= 10]
        assert ((body >= 710) == part).all()
    with pytest.raises(IndexError):
        rows[-1]


def test_epochs_are_of_all_parts_together():
    rows = mixed((2, 1))  # 96 and 156 tokens an epoch
    assert rows.epochs(0) == 0 and rows.epochs(63) == pytest.approx(63 * 8 / 252)


def test_identity_names_weights_seed_and_texts():
    same, other = mixed((2, 1)).identity, mixed((4, 2)).identity
    assert same == other and same["weights"] == "0.666666667,0.333333333"
    for different in (mixed((1, 2)), mixed((2, 1), seed=1), mixed((2, 1), fingerprint="other")):
        assert different.identity != same


def test_loader_goes_on_where_a_mixture_was_left():
    whole, rest = Loader(mixed((2, 1))), Loader(mixed((2, 1)))
    whole.take(50)
    rest.restore(whole.state())
    np.testing.assert_array_equal(rest.take(7)["tokens"], whole.take(7)["tokens"])
    with pytest.raises(ValueError, match=r"weights was 0\.66.*, is 0\.333.*set data\.weights back"):
        Loader(mixed((1, 2))).restore(whole.state())
    for loader in (whole, rest):
        loader.close()

"""Rows of conversations: nothing lost, nothing cut, and an order that depends on the seed alone."""

import dataclasses

import numpy as np
import pytest

from dsjax.posttrain.messages import TokenizedConversations
from dsjax.posttrain.rows import ConversationRows, HeldoutRows, ShuffledRows, hold_out, pack

LENGTHS = [3, 9, 5, 2, 8, 4, 4, 6, 1, 7, 9, 3]


def conversations(lengths=LENGTHS):
    """Conversation n has tokens 100 n, 100 n + 1, ...; its second half is trained."""
    ids = [np.arange(100 * n, 100 * n + length, dtype=np.int32) for n, length in enumerate(lengths)]
    trained = [np.arange(length) >= (length + 1) // 2 for length in lengths]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return TokenizedConversations(np.concatenate(ids), np.concatenate(trained), offsets, 0, 0, 0)


def rows(numbers=None, sequence_length=8):
    numbers = np.arange(len(LENGTHS)) if numbers is None else np.asarray(numbers)
    return ConversationRows(conversations(), numbers, sequence_length=sequence_length, pad=77)


def test_every_conversation_is_whole_in_one_row():
    whole, found = conversations(), {}
    for row in rows():
        tokens, segments, weights = row["tokens"], row["segment_ids"], row["weights"]
        assert (tokens.dtype, segments.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
        assert tokens.shape == segments.shape == weights.shape == (9,)
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            found[int(tokens[inside][0]) // 100] = (tokens[inside], weights[inside])
        assert (tokens[segments == 0] == 77).all() and not weights[segments == 0].any()
    assert sorted(found) == list(range(len(LENGTHS)))
    for number, (tokens, weights) in found.items():
        ids, trained = whole.one(number)
        np.testing.assert_array_equal(tokens, ids)
        np.testing.assert_array_equal(weights, trained)


def test_counts_are_those_of_the_rows():
    packed = rows()
    assert packed.tokens == sum(LENGTHS)
    weights = [row["weights"].sum() for row in packed]
    # the only token of conversation 8 is not trained
    assert packed.trained == sum(weights) == sum(length // 2 for length in LENGTHS)
    assert packed.fill == sum(LENGTHS) / (9 * len(packed))


def test_packing_is_tight():
    assert len(rows()) == -(-sum(LENGTHS) // 9)
    lengths = np.random.default_rng(0).integers(1, 1000, 5000)
    bins = pack(lengths, 4096)
    loads = [lengths[items].sum() for items in bins]
    assert max(loads) <= 4096 and sum(loads) == lengths.sum()
    assert sorted(i for items in bins for i in items) == list(range(5000))
    assert len(bins) == -(-lengths.sum() // 4096)
    assert pack(np.array([], int), 8) == []


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_takes_every_row_once(epoch):
    packed = rows()
    shuffled, count = ShuffledRows(packed, seed=3), len(packed)
    first = [shuffled[epoch * count + i]["tokens"].tolist() for i in range(count)]
    assert sorted(first) == sorted(row["tokens"].tolist() for row in packed)


def test_orders_differ_between_epochs_and_seeds_and_repeat():
    packed = rows(sequence_length=9)

    def order(seed, epoch):
        shuffled = ShuffledRows(packed, seed=seed)
        return [int(shuffled[epoch * len(packed) + i]["tokens"][0]) for i in range(len(packed))]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) > 6


def test_identity_follows_tokens_mask_choice_and_length():
    own = conversations()

    def fingerprint(change=None, numbers=range(12), length=8):
        arrays = [own.ids.copy(), own.trained.copy()]
        if change is not None:
            arrays[change][-1] ^= 1
        changed = dataclasses.replace(own, ids=arrays[0], trained=arrays[1])
        packed = ConversationRows(changed, np.array(numbers), sequence_length=length, pad=0)
        return ShuffledRows(packed, seed=0).identity["fingerprint"]

    found = [fingerprint(), fingerprint(0), fingerprint(1)]
    found += [fingerprint(numbers=range(11)), fingerprint(length=9)]
    assert len(set(found)) == 5 and fingerprint() == found[0]
    assert ShuffledRows(rows(), seed=4).identity.keys() == {
        "fingerprint",
        "seed",
        "sequence_length",
    }


def test_rows_that_do_not_exist_are_an_error():
    with pytest.raises(IndexError):
        rows()[99]
    with pytest.raises(IndexError):
        ShuffledRows(rows(), seed=0)[-1]


class Letters:
    """Decodes each token as one two-byte letter."""

    def decode(self, ids):
        return "\u00e9" * len(ids)


def test_held_out_rows_count_the_bytes_of_what_is_trained():
    packed = rows()
    held = HeldoutRows(packed, Letters())
    assert held.row_bytes.sum() == 2 * packed.trained and len(held) == len(packed)
    assert held.batch([0, 2])["weights"].shape == (2, 9)
    assert held.spread(3) == [0, len(packed) // 3, 2 * len(packed) // 3]


@pytest.mark.parametrize(
    ("fraction", "held"), [(0.0, 0), (0.25, 25), (0.001, 1), (0.999, 99)], ids=str
)
def test_a_share_is_held_out(fraction, held):
    digests = np.random.default_rng(0).integers(0, 2**63, 100, np.uint64)
    training, out = hold_out(digests, fraction)
    assert len(out) == held and sorted([*training, *out]) == list(range(100))
    more = np.concatenate([digests, digests[:1]])
    sides = [0 in side and 100 in side for side in hold_out(more, fraction)]
    assert sum(sides) == 1  # equal conversations are on the same side


@pytest.mark.parametrize("digests", [[5], [5, 5, 5]])
def test_something_is_left_to_train_on(digests):
    training, held = hold_out(np.array(digests, np.uint64), 0.5)
    assert len(training) == len(digests) and len(held) == 0

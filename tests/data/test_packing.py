"""Packing loses and doubles nothing, fill-in-the-middle can be undone, evaluation counts once."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.corpus import TokenizedDocuments
from dsjax.data.packing import PackedSequences, heldout_sequences
from dsjax.data.shuffling import mix, stream_key
from dsjax.text.tokenizer import SpecialTokens

SPECIAL = SpecialTokens(bos=0, eos=1, pad=2, fim=(3, 4, 5))
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=20)


def make_documents(lengths, first=10) -> TokenizedDocuments:
    """Documents in which every token occurs once, so that a lost or doubled one shows."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(first, first + offsets[-1], dtype=np.uint16)
    return TokenizedDocuments(tokens, offsets, np.asarray(lengths, np.int64) * 3, "fingerprint")


def stream_of(rows, count):
    """What the first `count` windows show, which overlap by one token."""
    parts = [rows.window(i)["tokens"] for i in range(count)]
    for left, right in itertools.pairwise(parts):
        assert left[-1] == right[0]
    return np.concatenate([parts[0][:1], *(part[1:] for part in parts)])


def split_documents(stream):
    """The documents of a stream, without begin and end; the last, which may be cut, is left out."""
    bounds = np.flatnonzero(stream == SPECIAL.bos)
    pieces = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    assert all(piece[-1] == SPECIAL.eos for piece in pieces)
    return [piece[1:-1].tolist() for piece in pieces]


def undo_fim(body):
    """The document that was rearranged: prefix, middle, suffix."""
    if body[0] != SPECIAL.fim[0]:
        assert not set(SPECIAL.fim) & set(body)
        return body
    hole, end = body.index(SPECIAL.fim[1]), body.index(SPECIAL.fim[2])
    prefix, suffix, middle = body[1:hole], body[hole + 1 : end], body[end + 1 :]
    return prefix + middle + suffix


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 9))
def test_packing_holds_every_document_once_an_epoch(lengths, length, rate, seed):
    documents = make_documents(lengths)
    if sum(lengths) + 2 * len(lengths) <= length:
        return
    rows = PackedSequences(documents, SPECIAL, sequence_length=length, seed=seed, fim_rate=rate)
    epochs = 3
    per_epoch = sum(lengths) + 2 * len(lengths) + int(3 * rate * len(lengths))
    count = -(-(epochs * per_epoch + 6 * epochs) // length) + 1
    found = split_documents(stream_of(rows, count))
    want = sorted(documents[i].tolist() for i in range(len(documents)))
    for epoch in range(epochs):
        part = found[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(undo_fim(body) for body in part) == want


def test_fim_rate_is_exact_over_the_epochs():
    rows = PackedSequences(make_documents([5] * 7), SPECIAL, sequence_length=48, fim_rate=0.1)
    stream = stream_of(rows, 110)
    found = split_documents(stream)[:700]
    chosen = [body[0] == SPECIAL.fim[0] for body in found]
    assert len(found) == 700 and sum(chosen) == 70
    assert max(np.reshape(chosen, (100, 7)).sum(1)) == 1


def test_fim_chooses_and_cuts_evenly():
    rows = PackedSequences(make_documents([9] * 50), SPECIAL, sequence_length=500, fim_rate=0.3)
    bodies = split_documents(stream_of(rows, 300))
    bodies = [body for body in bodies if body[0] == SPECIAL.fim[0]]
    documents = [(min(set(body) - set(SPECIAL.fim)) - 10) // 9 for body in bodies]
    counts = np.bincount(documents, minlength=50)
    assert len(bodies) > 3000 and counts.min() > 0.6 * counts.mean()
    prefix = np.bincount([body.index(SPECIAL.fim[1]) - 1 for body in bodies], minlength=10)
    # The smaller of two uniform numbers on 0..9 is k with probability (19 - 2k) / 100.
    want = (19 - 2 * np.arange(10)) / 100
    np.testing.assert_allclose(prefix / len(bodies), want, atol=0.015)


def test_segments_number_the_documents_of_a_row():
    rows = PackedSequences(make_documents([3, 8, 1, 4] * 3), SPECIAL, sequence_length=16)
    for i in range(20):
        row = rows[i]
        assert {array.dtype for array in row.values()} == {np.dtype(np.int32)}
        assert {array.shape for array in row.values()} == {(17,)}
        begins = row["tokens"] == SPECIAL.bos
        want = np.cumsum(begins) + (0 if begins[0] else 1)
        np.testing.assert_array_equal(row["segment_ids"], want)


def test_order_is_new_each_epoch_and_fixed_by_the_seed():
    documents = make_documents([4] * 30)
    epochs = {}
    for seed in (0, 0, 1):
        rows = PackedSequences(documents, SPECIAL, sequence_length=90, seed=seed)
        bodies = split_documents(stream_of(rows, 5))
        for epoch in (0, 1):
            key, order = (seed, epoch), [body[0] for body in bodies[30 * epoch : 30 * epoch + 30]]
            assert epochs.setdefault(key, order) == order
    assert len({tuple(order) for order in epochs.values()}) == 4


def test_rows_are_frozen():
    """A run that a later version resumes must see the same data; this row was written down once."""
    rows = PackedSequences(make_documents([4, 7, 2]), SPECIAL, sequence_length=12, fim_rate=0.5)
    assert rows.window(7)["tokens"].tolist() == [1, 0, 3, 4, 11, 12, 13, 5, 10, 1, 0, 21, 22]
    rows = PackedSequences(make_documents([9] * 9), SPECIAL, sequence_length=12)
    assert [rows.window_of(row) for row in range(9)] == [6, 4, 7, 0, 3, 2, 1, 8, 5]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 30), st.sampled_from([0.0, 0.3]))
def test_rows_are_the_windows_of_their_epoch_shuffled(lengths, length, rate):
    if sum(lengths) + 2 * len(lengths) <= length:
        return
    rows = PackedSequences(make_documents(lengths), SPECIAL, sequence_length=length, fim_rate=rate)
    for _, group in itertools.groupby(range(60), rows.epoch_of):
        epoch = list(group)
        if epoch[-1] < 59:  # whole
            assert sorted(map(rows.window_of, epoch)) == epoch


def test_neighbouring_rows_are_of_different_documents():
    """A batch of windows that follow one another would be of one document."""
    rows = PackedSequences(make_documents([600] * 20), SPECIAL, sequence_length=20)
    batch = [rows[row]["tokens"].max() // 600 for row in range(16)]
    assert len(set(batch)) >= 9
    again = PackedSequences(make_documents([600] * 20), SPECIAL, sequence_length=20, seed=1)
    assert [again.window_of(row) for row in range(16)] != [rows.window_of(row) for row in range(16)]


def test_rows_come_in_any_order_from_any_thread():
    documents = make_documents([5, 9, 30, 2] * 5)
    want = [
        PackedSequences(documents, SPECIAL, sequence_length=50, fim_rate=0.5)[i] for i in range(40)
    ]
    rows = PackedSequences(documents, SPECIAL, sequence_length=50, fim_rate=0.5)
    for i in np.random.default_rng(0).permutation(40):
        for name, array in rows[int(i)].items():
            np.testing.assert_array_equal(array, want[i][name])
    assert len(rows._layouts) == 2


def test_epoch_of_a_row_is_that_of_its_first_token():
    rows = PackedSequences(make_documents([5] * 10), SPECIAL, sequence_length=7, fim_rate=0.15)
    ends = np.cumsum([73, 76] * 200)  # 1 and 2 rearranged documents in turn
    for row in range(0, 4000, 7):
        assert rows.epoch_of(row) == np.searchsorted(ends, row * 7, side="right")


def test_far_rows_are_found_at_once():
    rows = PackedSequences(make_documents([5] * 10), SPECIAL, sequence_length=7, fim_rate=0.15)
    assert rows[10**12]["tokens"].shape == (8,)


def test_mix_is_splitmix64():
    """The first outputs of the published generator from seed 1234567."""
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix(1234567, np.arange(3, dtype=np.uint64)).tolist() == want
    keys = {stream_key(purpose, seed, epoch) for purpose in ("order", "fim") for seed in (1, 11)
            for epoch in (1, 11)}  # fmt: skip
    assert len(keys) == 8


def test_packing_rejects_too_little_text():
    message = r"2 train documents have 12 tokens, one sequence of data\.sequence_length=12 needs 13"
    with pytest.raises(ValueError, match=message):
        PackedSequences(make_documents([3, 5]), SPECIAL, sequence_length=12)
    PackedSequences(make_documents([3, 5]), SPECIAL, sequence_length=11)


def test_packing_rejects_fim_without_its_tokens():
    special = SpecialTokens(bos=0, eos=1, pad=1)
    with pytest.raises(ValueError, match=r"data\.fim_rate=0\.1 needs the token .* set data\.fim_r"):
        PackedSequences(make_documents([30]), special, sequence_length=8, fim_rate=0.1)
    PackedSequences(make_documents([30]), special, sequence_length=8)


def test_negative_rows_are_refused():
    with pytest.raises(IndexError, match=r"row -1 is negative"):
        PackedSequences(make_documents([30]), SPECIAL, sequence_length=8)[-1]


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 50))
def test_evaluation_predicts_every_token_once(lengths, length):
    documents = make_documents(lengths)
    rows = heldout_sequences(documents, SPECIAL, sequence_length=length)
    predicted = []
    for i in range(len(rows)):
        tokens, segments = rows[i]["tokens"], rows[i]["segment_ids"]
        assert tokens.shape == segments.shape == (length + 1,)
        used = int(segments.sum())
        assert segments.tolist() == [1] * used + [0] * (length + 1 - used)
        assert set(tokens[used:]) <= {SPECIAL.pad}
        assert used >= 2
        predicted.append(tokens[1:used])
    want = [[*documents[i].tolist(), SPECIAL.eos] for i in range(len(documents))]
    assert np.concatenate(predicted).tolist() == [token for body in want for token in body]
    np.testing.assert_allclose(rows.row_bytes.sum(), rows.total_bytes)
    assert rows.total_bytes == 3 * sum(lengths)


def test_evaluation_windows_carry_their_context():
    rows = heldout_sequences(make_documents([5]), SPECIAL, sequence_length=4)
    assert [rows[i]["tokens"].tolist() for i in range(2)] == [
        [0, 10, 11, 12, 13],
        [13, 14, 1, 2, 2],
    ]
    assert rows.row_bytes.tolist() == [10.0, 5.0]


def test_evaluation_sample_is_spread_over_all_rows():
    rows = heldout_sequences(make_documents([10] * 100), SPECIAL, sequence_length=11)
    assert rows.spread(4) == [0, 25, 50, 75]
    assert rows.spread(1000) == list(range(100))
    assert rows.batch([0, 99])["tokens"][:, 1].tolist() == [10, 1000]
    with pytest.raises(IndexError, match=r"row 100 of 100"):
        rows[100]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_epochs_count_the_documents_that_came_before(rate):
    documents = make_documents([7, 3, 12, 5])  # 35 tokens with begin and end, 41 with two holes
    rows = PackedSequences(documents, SPECIAL, sequence_length=5, fim_rate=rate)
    per_epoch = 35 + 3 * 4 * rate
    assert rows.epochs(0) == 0
    for row in range(1, 60):
        assert rows.epochs(row) == pytest.approx(5 * row / per_epoch)
        assert int(rows.epochs(row)) == rows.epoch_of(row)

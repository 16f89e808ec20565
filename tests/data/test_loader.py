"""Batches are the same rows for any number of processes; a restored loader goes on bit-equal."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dsjax.data.corpus import TokenizedDocuments
from dsjax.data.loader import Loader
from dsjax.data.packing import PackedSequences
from dsjax.text.tokenizer import SpecialTokens

SPECIAL = SpecialTokens(bos=0, eos=1, pad=2, fim=(3, 4, 5))


def make_rows(fingerprint="f", **options) -> PackedSequences:
    lengths = np.arange(3, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(10, 10 + offsets[-1], dtype=np.uint16)
    documents = TokenizedDocuments(tokens, offsets, lengths, fingerprint)
    return PackedSequences(
        documents, SPECIAL, **{"sequence_length": 16, "seed": 3, "fim_rate": 0.5} | options
    )


@pytest.fixture
def open_loader():
    loaders = []

    def make(rows=None, **options):
        loaders.append(Loader(rows or make_rows(), **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def assert_batches_equal(got, want):
    for name in ("tokens", "segment_ids"):
        assert got[name].dtype == np.int32
        np.testing.assert_array_equal(got[name], want[name])


def expected(first, n):
    rows = [make_rows()[i] for i in range(first, first + n)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_loader_hands_out_the_rows_in_order(open_loader):
    loader, first = open_loader(), 0
    for n in (4, 4, 4, 8, 8, 2, 300):
        assert_batches_equal(loader.take(n), expected(first, n))
        first += n


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_of_one(open_loader, processes):
    """Every so manyth row each, which is no block of them."""
    parts = [
        open_loader(share=lambda n, index=index: np.arange(index, n, processes))
        for index in range(processes)
    ]
    first = 0
    for n in (4, 4, 12, 12, 8):
        batches = [part.take(n) for part in parts]
        joined = {
            name: np.stack([batch[name] for batch in batches], axis=1).reshape(n, -1)
            for name in batches[0]
        }
        assert_batches_equal(joined, expected(first, n))
        first += n
    assert len({json.dumps(part.state()) for part in parts}) == 1


def test_restored_loader_goes_on_where_the_state_was_taken(open_loader):
    loader = open_loader()
    for n in (4, 4, 6):
        loader.take(n)
    state = json.loads(json.dumps(loader.state()))
    want = [loader.take(6) for _ in range(5)]
    fresh = open_loader()
    fresh.take(8)
    fresh.restore(state)
    for batch in want:
        assert_batches_equal(fresh.take(6), batch)
    assert fresh.state() == loader.state()
    loader.restore(state)
    assert_batches_equal(loader.take(6), want[0])


def test_state_restores_onto_another_number_of_processes(open_loader):
    loader = open_loader()
    loader.take(4)
    half = open_loader(share=lambda n: np.arange(n // 2, n))
    half.restore(loader.state())
    assert_batches_equal(half.take(4), expected(6, 2))


def test_closed_loader_can_go_on(open_loader):
    loader = open_loader()
    loader.take(4)
    loader.close()
    loader.close()
    assert_batches_equal(loader.take(4), expected(4, 4))


def test_interrupted_take_loses_no_row(open_loader, monkeypatch):
    loader = open_loader()
    loader.take(4)
    reader = loader._reader

    class Interrupted:
        close = reader.close

        def __next__(self):
            next(reader)
            raise KeyboardInterrupt

    loader._reader = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        loader.take(4)
    assert_batches_equal(loader.take(4), expected(4, 4))


def test_rows_are_read_ahead(open_loader):
    class Counting:
        identity = make_rows().identity

        def __init__(self):
            self.read = []

        def __getitem__(self, index):
            self.read.append(index)
            return make_rows()[index]

    rows = Counting()
    loader = open_loader(rows)
    loader.take(4)
    loader._reader._executor.shutdown(wait=True)
    assert sorted(rows.read) == list(range(12))  # two batches beyond the one handed out


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 4}, r"seed was 3, is 4 \(set data\.seed back\)$"),
        ({"sequence_length": 8}, r"sequence_length was 16, is 8 \(set data\.sequence_length back"),
        ({"fim_rate": 0.0}, r"fim_rate was 0\.5, is 0\.0 \(set data\.fim_rate back"),
        ({"fingerprint": "g"}, r"fingerprint was f, is g \(the text, the split or the tokenizer"),
        ({"seed": 4, "fingerprint": "g"}, r"fingerprint was .*; seed was"),
    ],
)
def test_restore_rejects_the_state_of_other_rows(open_loader, other, message):
    state = open_loader().state()
    with pytest.raises(ValueError, match=message):
        open_loader(make_rows(**other)).restore(state)


def test_restore_rejects_damaged_states(open_loader):
    loader = open_loader()
    with pytest.raises(ValueError, match=r"version was 0, is 1 \(the checkpoint is of another"):
        loader.restore(loader.state() | {"version": 0})
    for next_row in (-1, "3", None):
        with pytest.raises(ValueError, match=r"next_row=.*, which is no row number; the checkp"):
            loader.restore(loader.state() | {"next_row": next_row})


def test_importing_the_data_package_imports_neither_jax_nor_grain():
    code = (
        "import sys, dsjax.data.corpus, dsjax.data.loader, dsjax.data.packing\n"
        "print(sorted({'jax', 'grain', 'pyarrow', 'zstandard'} & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"

"""Held-out rows are scored once each, and padding counts nowhere."""

import math

import numpy as np
import pytest

from dsjax.data.corpus import TokenizedDocuments
from dsjax.data.packing import heldout_sequences
from dsjax.text.tokenizer import SpecialTokens
from dsjax.train.evaluate import Evaluation, evaluate


@pytest.fixture
def heldout():
    """Three documents of 5, 9 and 2 tokens and 4 bytes a token, in rows of 4 predicted tokens."""
    lengths = np.array([5, 9, 2])
    documents = TokenizedDocuments(
        tokens=np.arange(10, 26, dtype=np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        byte_counts=(4 * lengths).astype(np.int64),
        fingerprint="none",
    )
    return heldout_sequences(documents, SpecialTokens(bos=0, eos=1, pad=2), sequence_length=4)


def score(batch):
    """A model that spends 2 nats on each target."""
    assert batch["tokens"].shape == (4, 5)
    targets = int((batch["segment_ids"][:, 1:] > 0).sum())
    return 2.0 * targets, targets


def test_evaluation_of_all_rows_is_exact(heldout):
    result = evaluate(score, heldout, range(len(heldout)), batch_size=4)
    targets = 16 + 3  # every token and the end of each document
    assert result == Evaluation(2.0, pytest.approx(2.0 * targets / math.log(2) / 64))


def test_evaluation_of_some_rows_uses_their_own_bytes(heldout):
    result = evaluate(score, heldout, [0], batch_size=4)
    assert result == Evaluation(2.0, pytest.approx(2.0 * 4 / math.log(2) / (20 * 4 / 6)))


def test_evaluation_ends_when_interrupted(heldout):
    asked = []
    assert (
        evaluate(
            score,
            heldout,
            range(6),
            batch_size=4,
            interrupted=lambda: bool(asked) or asked.append(1),
        )
        is None
    )

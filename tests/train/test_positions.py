"""Groups of positions cover a sequence, and sums go to the group that a token is in."""

import numpy as np
import pytest

from dsjax.model.inputs import read_tokens
from dsjax.train import positions


@pytest.mark.parametrize(
    "length, starts",
    [(1, [0]), (32, [0]), (33, [0, 32]), (256, [0, 32, 64, 128]), (300, [0, 32, 64, 128, 256])],
)
def test_groups_are_powers_of_two_below_the_length(length, starts):
    assert positions.group_starts(length) == starts


def test_sums_go_to_the_group_of_a_position_in_its_document():
    """Two packed documents of 100 and 60 tokens: a later row place is an early position."""
    segments = np.repeat([1, 2], [100, 60])[None].astype(np.int32)
    read = read_tokens(np.zeros_like(segments), segments, isolate=True, n_mtp=0)
    values = np.arange(160, dtype=np.float32)[None]
    got = positions.sum_by_position(values, read.positions, positions.group_starts(160))
    place = np.concatenate([np.arange(100), np.arange(60)])
    want = [values[0, (place >= a) & (place < b)].sum() for a, b in ((0, 32), (32, 64), (64, 128))]
    np.testing.assert_allclose(got, [*want, 0.0])


def test_names_say_first_and_last_position():
    named = positions.named([3.0, float("nan"), 1.5], 100)
    assert named == {"eval_loss_0_31": 3.0, "eval_loss_64_99": 1.5}
    assert all(map(positions.is_by_position, named))
    assert [positions.position_of(name) for name in named] == [31, 99]
    assert not positions.is_by_position("eval_loss")


def test_one_group_says_no_more_than_the_loss():
    assert positions.named([3.0], 16) == {}

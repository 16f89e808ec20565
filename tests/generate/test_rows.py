"""What the host knows of the rows of a cache, and how it moves between caches."""

import functools

import jax.numpy as jnp

from dsjax.generate.decoding import Carry
from dsjax.generate.request import Request
from dsjax.generate.rows import Open, Rows, cache_length
from dsjax.generate.sampling import Sampling
from dsjax.model.cache import Cache
from tests.model.tiny import TINY

FIRST = Open(1, Request((4, 5, 6), 3, stop_ids=frozenset({9, 8, 7})))
SECOND = Open(2, Request((3,), 2, Sampling(0.5, seed=6), logprobs=True))


def rows(*slots):
    return Rows(slots, Carry(Cache(None, None, None), jnp.zeros((len(slots), 2, 4))), 256)


def test_rows_start_behind_their_prompts():
    found = rows(FIRST, None, SECOND)
    assert found.position_B.tolist() == [3, 1, 1] and found.left_B.tolist() == [3, 0, 2]
    assert found.recent_BW.tolist() == [[5, 6], [0, 0], [0, 3]]
    assert sorted(found.stop_ids_BX[0].tolist()) == [-1, 7, 8, 9]
    assert (found.stop_ids_BX[1:] == -1).all()
    assert found.knobs.temperature_B.tolist() == [1.0, 1.0, 0.5]
    assert found.wanted == (True, False)
    assert found.n_open == 2 and found.free() == [1]


def test_first_token_counts_and_may_be_the_last():
    found = rows(FIRST, SECOND)
    found.begin(0, 8)
    found.begin(1, 8)
    assert found.left_B.tolist() == [0, 1]
    assert found.recent_BW.tolist() == [[6, 8], [3, 8]]


def test_rows_that_move_take_their_numbers_along():
    theirs, ours = rows(FIRST, SECOND), rows(None, None, None)
    theirs.begin(1, 11)
    ours.take(theirs, {1: 2})
    assert ours.slots == [None, None, SECOND] and theirs.slots == [FIRST, None]
    assert ours.position_B.tolist() == [1, 1, 1] and ours.left_B.tolist() == [0, 0, 1]
    assert ours.recent_BW[2].tolist() == [3, 11] and theirs.left_B.tolist() == [3, 0]
    assert ours.knobs.temperature_B.tolist() == [1.0, 1.0, 0.5] and ours.wanted.logprobs


def test_cache_fits_the_request_in_few_sizes():
    """Powers of two from 256 on, and never more than what the model's longest text needs."""
    length = functools.partial(cache_length, TINY, chunk=16)
    assert [length(n, n_drafts=0, streaming=False) for n in (20, 129)] == [128, 256]
    lengths = [length(needed, n_drafts=0) for needed in (3, 256, 257, 2048, 2049, 4096)]
    assert lengths == [256, 256, 512, 2048, 4096, 4096]
    assert length(4096, n_drafts=2) == 4096 + 16  # drafts stand beyond the end

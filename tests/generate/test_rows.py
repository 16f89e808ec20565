"""What the host knows of the rows of a cache, and how it moves between caches."""

import dataclasses
import functools

import jax.numpy as jnp

from dsjax.generate.decoding import Carry
from dsjax.generate.request import Request
from dsjax.generate.rows import Open, Rows, cache_length, few_shapes, fit
from dsjax.generate.sampling import Sampling
from dsjax.model.cache import Cache
from tests.model.tiny import TINY


def first():
    return Open(1, Request((4, 5, 6), 3, stop_ids=frozenset({9, 8, 7})))


def second():
    return Open(2, Request((3,), 2, Sampling(0.5, seed=6), logprobs=True))


def rows(*slots):
    return Rows(slots, Carry(Cache(None, None, None), jnp.zeros((len(slots), 2, 4))), 256)


def test_rows_stand_at_their_newest_tokens():
    found = rows(first(), None, second())
    assert found.position_B.tolist() == [2, 0, 0] and found.left_B.tolist() == [3, 0, 2]
    assert found.recent_BW.tolist() == [[5, 6], [0, 0], [0, 3]]
    assert sorted(found.stop_ids_BX[0].tolist()) == [-1, 7, 8, 9]
    assert (found.stop_ids_BX[1:] == -1).all()
    assert found.knobs.temperature_B.tolist() == [1.0, 1.0, 0.5]
    assert found.wanted.logprobs and not found.wanted.experts
    assert found.open() == [0, 2] and found.free() == [1]


def test_new_tokens_count_and_a_stop_id_is_the_last():
    one, other = first(), second()
    one.add([8])
    other.add([8])
    assert (one.left, other.left) == (0, 1)
    assert (one.tokens, other.tokens) == ([4, 5, 6, 8], [3, 8])


def test_requests_take_their_numbers_along():
    theirs, ours = rows(first(), second()), rows(None, None, None)
    (going,) = theirs.slots[1:]
    going.add([11])
    ours.put({2: going})
    theirs.release(1)
    assert ours.slots == [None, None, going] and theirs.open() == [0]
    assert ours.position_B.tolist() == [0, 0, 1] and ours.left_B.tolist() == [0, 0, 1]
    assert ours.recent_BW[2].tolist() == [3, 11] and theirs.left_B.tolist() == [3, 0]
    assert ours.knobs.temperature_B.tolist() == [1.0, 1.0, 0.5] and ours.wanted.logprobs


def test_cache_fits_the_request_in_few_sizes():
    """Powers of two from 256 on, and never more than what the model's longest text needs."""
    length = functools.partial(cache_length, TINY, chunk=16)
    assert [length(n, n_drafts=0, streaming=False) for n in (20, 129)] == [128, 256]
    lengths = [length(needed, n_drafts=0) for needed in (3, 256, 257, 2048, 2049, 4096)]
    assert lengths == [256, 256, 512, 2048, 4096, 4096]
    assert length(4096, n_drafts=2) == 4096 + 16  # drafts stand beyond the end


def test_few_shapes_are_powers_of_four_that_hold_whole_chunks():
    def shapes(length, **options):
        options = {"max_batch": 16, "batch_parts": 1, "chunk": 256, "n_drafts": 1} | options
        return few_shapes(dataclasses.replace(TINY, max_seq_len=length), **options)

    assert shapes(4096) == ((1, 4, 16), (512, 2048, 4352), (16, 64, 256))
    assert shapes(4096, n_drafts=0).lengths == (512, 2048, 4096)
    assert shapes(100, chunk=16, max_batch=6) == ((1, 4, 6), (112,), (16,))
    assert shapes(512, max_batch=3, batch_parts=2).rows == (2, 4)
    assert shapes(10_000, chunk=1024).lengths == (1024, 4096, 10_240)
    assert [fit(needed, (4, 16)) for needed in (1, 4, 5, 17)] == [4, 4, 16, 16]

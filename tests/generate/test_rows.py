"""What the host knows of the rows of a cache, and how it moves between caches."""

import jax.numpy as jnp

from dsjax.generate.decoding import Carry
from dsjax.generate.request import Request
from dsjax.generate.rows import Open, Rows
from dsjax.generate.sampling import Sampling
from dsjax.model.cache import Cache


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
    assert found.knobs.temperature_B.tolist() == [1.0, 0.0, 0.5]
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
    assert ours.knobs.temperature_B.tolist() == [0.0, 0.0, 0.5] and ours.wanted.logprobs


def test_rows_take_their_likeliest_tokens_unless_a_request_draws():
    greedy = Open(3, Request((3,), 2, Sampling(0.0)))
    found = rows(None, greedy)
    assert found.likeliest  # a free row draws nothing
    found.put({0: second()})
    assert not found.likeliest
    found.release(0)
    assert not found.likeliest  # the program stays

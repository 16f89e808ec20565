"""Numbers and orders: published vectors, and that each place has its own."""

import numpy as np

from dsjax.data.shuffling import mix, permute, shuffled, stream_key


def test_mix_is_splitmix64():
    # The first outputs of the reference generator (Vigna's splitmix64.c) from seed 0.
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix(0, np.arange(3, dtype=np.uint64)).tolist() == wanted


def test_streams_differ_by_purpose_seed_and_epoch():
    keys = {stream_key(*given) for given in [("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1)]}
    assert len(keys) == 4 and all(0 <= key < 1 << 64 for key in keys)
    assert stream_key("a", 0, 0) == stream_key("a", 0, 0)


def test_orders_are_permutations_that_the_key_decides():
    for count in (1, 2, 7, 100):
        assert sorted(permute(index, count, 5) for index in range(count)) == list(range(count))
        assert sorted(shuffled(count, 5).tolist()) == list(range(count))
    assert shuffled(100, 5).tolist() != shuffled(100, 6).tolist()
    assert shuffled(0, 5).shape == (0,)

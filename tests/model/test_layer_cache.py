"""That reading and writing one layer's entries touches no others."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.model.layer_cache import LayerCache


def test_append_writes_its_own_entries_and_no_others():
    L, B, P, S, T = 3, 2, 2, 16, 4
    rng = np.random.default_rng(0)
    widths = {"key": 5, "other": 2, "value": 3}
    stacks = {n: rng.normal(size=(L, B, P, S, X)).astype(np.float32) for n, X in widths.items()}
    new = {n: rng.normal(size=(B, T, P, X)).astype(np.float32) for n, X in widths.items()}
    del new["other"]
    starts_B = jnp.asarray([12, 3], jnp.int32)  # the first row's end with the cache

    @jax.jit
    def append(entries, layer):
        return LayerCache(entries, layer).append(starts_B, **new)

    got = append({name: jnp.asarray(stack) for name, stack in stacks.items()}, jnp.int32(1))
    want = {name: stack.copy() for name, stack in stacks.items()}
    for name, entry in new.items():
        want[name][1, 0, :, 12:16] = entry[0].swapaxes(0, 1)
        want[name][1, 1, :, 3:7] = entry[1].swapaxes(0, 1)
    read = got.read(3, 9)
    assert got.length == S and got.entries.keys() == read.keys() == want.keys()
    for name, expected in want.items():
        np.testing.assert_array_equal(got.entries[name], expected)
        np.testing.assert_array_equal(read[name], expected[1, :, :, 3:12])


def test_gather_reads_each_rows_positions_of_all_heads():
    L, B, P, S, X = 3, 2, 2, 16, 5
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(L, B, P, S, X)).astype(np.float32)
    positions_BTJ = rng.integers(0, S, (B, 4, 3), dtype=np.int32)

    cache = LayerCache({"key": jnp.asarray(stack)}, jnp.int32(1))
    got_BTJPX = cache.gather(jnp.asarray(positions_BTJ))["key"]
    want_BTJPX = np.stack([stack[1, b][:, positions_BTJ[b]] for b in range(B)])
    np.testing.assert_array_equal(got_BTJPX, np.moveaxis(want_BTJPX, 1, 3))

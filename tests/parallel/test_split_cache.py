"""A cache split over devices: written, attended to and copied as on one device, and never moved."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import cached_attention as kernel
from dsjax.kernels.sparse_attention import select
from dsjax.kernels.target import Target
from dsjax.model.cache import Cache
from dsjax.model.layer_cache import LayerCache
from dsjax.parallel import split_cache
from dsjax.parallel.mesh import make_mesh
from tests.closeness import F32, assert_close

L, B, P, S, X, N = 2, 3, 2, 48, 4, 4
LAYER = 1


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def on_devices(count, **others):
    sizes = {"context": count, **others}
    return jax.set_mesh(make_mesh(sizes, int(np.prod(list(sizes.values())))))


def held(whole, count):
    """Entries as the devices hold them, one device's part after the other."""
    return whole[
        ..., np.concatenate([np.arange(r, whole.shape[3], count) for r in range(count)]), :
    ]


def attention(cache, q_BTNX, positions_BT, scale=0.7):
    def read(start, size):
        entries = cache.read(start, size)
        return kernel.Block((entries["key"],), entries["value"])

    options = {"scale": scale, "target": Target("cpu"), "part": split_cache.part()}
    return kernel.cached_attention((q_BTNX,), read, cache.length, positions_BT, **options)


def extend(entries, new, q_BTNX, starts_B):
    """Adds tokens and attends from them."""
    cache = LayerCache(entries, jnp.int32(LAYER)).append(starts_B, **new)
    steps_T = jnp.arange(q_BTNX.shape[1], dtype=jnp.int32)
    positions_BT = starts_B[:, None] + steps_T[None]
    return cache.attend(attention, q_BTNX, positions_BT), cache.entries


def case(T, starts):
    entries = {name: normal(seed, L, B, P, S, X) for seed, name in enumerate(("key", "value"))}
    new = {name: normal(seed, B, T, P, X) for seed, name in ((5, "key"), (6, "value"))}
    return entries, new, normal(7, B, T, N, X), jnp.asarray(starts, jnp.int32)


@pytest.mark.parametrize(
    ("count", "others", "T", "starts"),
    [
        (4, {}, 1, (0, 21, 47)),  # the first token of all; the last
        (4, {"tensor": 2}, 3, (45, 6, 0)),  # fewer tokens than devices
        (4, {}, 16, (0, 5, 32)),
        (3, {}, 7, (41, 2, 13)),  # some devices get one more than others
        (2, {"tensor": 2, "expert": 2}, 5, (43, 0, 8)),
    ],
)
def test_tokens_are_added_and_attended_to_as_on_one_device(count, others, T, starts, monkeypatch):
    """In blocks of 4 places, the last of which is moved back."""
    monkeypatch.setattr(kernel, "_MAX_SCORES", 1)
    monkeypatch.setattr(kernel, "_MIN_BLOCK", 4)
    entries, new, q, starts_B = case(T, starts)
    want, kept = extend(entries, new, q, starts_B)
    split = jax.tree.map(functools.partial(held, count=count), entries)
    with on_devices(count, **others):
        got, got_kept = jax.jit(extend)(split, new, q, starts_B)
    assert_close(got, want, F32, "attention")
    for name, entry in kept.items():
        # Places of later tokens may hold anything.
        mine = np.asarray(got_kept[name])
        for row, end in enumerate(np.asarray(starts_B) + T):
            known = held(np.arange(S)[None, None, None, :, None] < end, count)[..., 0]
            written = np.where(known[..., None], mine[:, row : row + 1], 0)
            there = np.where(known[..., None], held(np.asarray(entry), count)[:, row : row + 1], 0)
            np.testing.assert_array_equal(written, there)


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_scores_of_any_size_are_joined(scale):
    """Exponentials of such scores overflow, or all vanish, unless relative to the highest of all
    devices.
    """
    entries, new, q, starts_B = case(1, (3, 47, 20))
    entries["key"], new["key"] = jnp.abs(entries["key"]) + 1, jnp.abs(new["key"]) + 1

    def attend(entries):
        cache = LayerCache(entries, jnp.int32(LAYER))
        return cache.attend(
            functools.partial(attention, scale=scale), jnp.abs(q), starts_B[:, None]
        )

    want = attend(entries)
    with on_devices(4):
        got = jax.jit(attend)(jax.tree.map(lambda x: held(x, 4), entries))
    assert_close(got, want, F32, "attention")


def test_keys_are_chosen_among_all_devices():
    """Equal scores on several devices, of which the first positions win; rows that see fewer keys
    than are chosen; and choices that lie on one device alone.
    """
    count, devices = 6, 4
    scores = np.random.default_rng(0).integers(-2, 3, (B, 5, S)).astype(np.float32)
    scores[0, 1] = 0.0
    scores[1, 2, 3::devices] = 7.0  # position 3, 7, ...: all with the last device
    positions_BT = jnp.asarray([[2, 3, 20, 30, 47], [0, 1, 40, 5, 6], [7, 11, 12, 46, 45]])
    visible = np.arange(S)[None, None] <= np.asarray(positions_BT)[..., None]
    selection = select(jnp.asarray(scores), jnp.asarray(visible), count)
    want = np.zeros(scores.shape, bool)
    for row, query in np.ndindex(*scores.shape[:2]):
        indices, valid = (np.asarray(x)[row, query] for x in selection)
        want[row, query, indices[valid]] = True

    def choose(scores_LBTSX, whole):
        own = scores_LBTSX[0, :, :, :, 0]
        here = split_cache.part()
        positions_11S = here.position(jax.lax.broadcasted_iota(jnp.int32, (1, 1, own.shape[2]), 2))
        best = select(own, positions_11S <= whole[..., None], count)
        values = jnp.take_along_axis(own, best.indices_BTJ, axis=2)
        found = here.position(best.indices_BTJ)
        wins = split_cache.chosen(values, found, best.valid_BTJ, count)
        rows, queries = (jax.lax.broadcasted_iota(jnp.int32, wins.shape, d) for d in (0, 1))
        mask = jnp.zeros(own.shape, bool).at[rows, queries, best.indices_BTJ].set(wins)
        return mask[None, ..., None]

    with on_devices(devices):
        split = held(jnp.asarray(scores)[None, ..., None], devices)
        got = jax.jit(lambda s, p: split_cache.update(choose, s, p))(split, positions_BT)
    np.testing.assert_array_equal(got, held(want[None, ..., None], devices))


def test_a_cache_stays_where_it_is():
    """Along `context` travel one maximum and one sum of what a query carries, and nothing that is
    as long as a device's part.
    """
    entries, new, q, starts_B = case(1, (0, 5, 47))
    with on_devices(4):
        text = jax.jit(extend).lower(entries, new, q, starts_B).compile().as_text()
    sent = re.findall(r"= (.*?) (all-[a-z]+|collective-permute|reduce-scatter)\(", text)
    sizes = {
        int(np.prod([int(n) for n in shape.split(",") if n] or [1]))
        for shapes, kind in sent
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
    }
    assert sent and max(sizes) <= B * N * X


@pytest.mark.parametrize("shorter", [16, S])
def test_rows_move_between_caches_within_their_device(shorter):
    """A shorter cache's part is the beginning of a longer one's."""
    mine, other = normal(0, L, B, P, S, X), normal(1, L, 2, P, shorter, X)
    rows, others = jnp.asarray([2, 0], jnp.int32), jnp.asarray([1, 0], jnp.int32)
    want = np.array(mine)
    want[:, [2, 0], :, :shorter] = np.asarray(other)[:, [1, 0]]

    def insert(mine, other):
        caches = (Cache({"key": x}, None, None) for x in (mine, other))
        into, source = caches
        return into.insert(rows, source, others).dense["key"]

    with on_devices(4):
        program = jax.jit(insert).lower(held(mine, 4), held(other, 4)).compile()
        got = program(*jax.device_put((held(mine, 4), held(other, 4)), program.input_shardings[0]))
    np.testing.assert_array_equal(got, held(want, 4))


def test_positions_are_put_in_order_and_back():
    entry = normal(0, L, B, P, S, X)
    with on_devices(4):
        np.testing.assert_array_equal(split_cache.in_order(held(entry, 4)), entry)
        np.testing.assert_array_equal(split_cache.in_parts(entry), held(entry, 4))

"""Attention to recent tokens and to entries, against loops over queries and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import compressed_attention
from dsjax.kernels.compressed_attention import Entries, IndexQueries, Places, attend
from dsjax.kernels.native_sparse import Stack
from tests.closeness import F32, assert_close

B, T, N, H, I, Y = 2, 14, 3, 4, 16, 5
RATIO, COUNT, WINDOW, SCALE = 2, 3, 3, 0.4
rng = np.random.default_rng(0)
Q, INDEX_Q = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, N, H), (B, T, I, Y)))
KEYS, SINK = rng.normal(size=(B, T, H)).astype(np.float32), np.array([0.5, -1.0, 2.0], np.float32)
W = rng.normal(size=(B, T, I)).astype(np.float32)
ENTRY, INDEX_KEY = (rng.normal(size=(B, T // RATIO, width)).astype(np.float32) for width in (H, Y))
# Row 0 holds one document, row 1 two, of 5 and 9 tokens; the first has an unfinished entry.
FIRST = np.array([[0] * T, [0] * 5 + [5] * 9], np.int32)
BEGINS = np.array([[0, 2, 4, 6, 8, 10, 12], [0, 2, 5, 7, 9, 11, -1]], np.int32)


def stack(x):
    return Stack(jnp.asarray(x)[None, :, None], 0)


def run(*, indexed=True, entries=True, count=COUNT, window=WINDOW, queries=slice(None)):
    held = None
    if entries:
        held = Entries(stack(ENTRY), jnp.asarray(BEGINS), RATIO)
        if indexed:
            held = held._replace(keys=stack(INDEX_KEY), topk=count)
    own = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))[:, queries]
    index = IndexQueries(jnp.asarray(INDEX_Q[:, queries]), jnp.asarray(W[:, queries]))
    return attend(
        jnp.asarray(Q[:, queries]),
        Places(jnp.asarray(own), jnp.asarray(FIRST[:, queries])),
        stack(KEYS),
        held,
        index if entries and indexed else None,
        jnp.asarray(SINK),
        window=window,
        scale=SCALE,
    )


def wanted(*, indexed=True, entries=True):
    out = np.zeros((B, T, N, H))
    for row, t in np.ndindex(B, T):
        first = FIRST[row, t]
        seen = [KEYS[row, s] for s in range(max(first, t - WINDOW + 1), t + 1)]
        if entries:
            begins = BEGINS[row]
            whole = [z for z in range(len(begins)) if first <= begins[z] <= t - RATIO + 1]
            if indexed:
                scores = {
                    z: sum(
                        W[row, t, i] * max(0.0, float(INDEX_Q[row, t, i] @ INDEX_KEY[row, z]))
                        for i in range(I)
                    )
                    for z in whole
                }
                whole = sorted(whole, key=lambda z: -scores[z])[:COUNT]
            seen += [ENTRY[row, z] for z in whole]
        for head in range(N):
            logits = np.array([Q[row, t, head] @ key * SCALE for key in seen] + [SINK[head]])
            weights = np.exp(logits - logits.max())
            out[row, t, head] = (weights / weights.sum())[:-1] @ np.array(seen)
    return out


@pytest.mark.parametrize(
    "given", [{}, {"indexed": False}, {"entries": False}], ids=["sparse", "heavy", "window"]
)
def test_attention_equals_loops_over_packed_documents(given):
    assert_close(run(**given), wanted(**given), F32)


@pytest.mark.parametrize("dense", [1, 8], ids=["gathered", "masked"])
def test_gradients_are_those_of_one_softmax_over_all_that_is_seen(dense, monkeypatch):
    """Of queries, tokens, entries and the sink; the choice has none."""
    monkeypatch.setattr(compressed_attention, "_DENSE", dense)
    weights = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    own = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    places = Places(own, jnp.asarray(FIRST))
    index = IndexQueries(jnp.asarray(INDEX_Q), jnp.asarray(W))
    held = Entries(stack(ENTRY), jnp.asarray(BEGINS), RATIO, stack(INDEX_KEY), COUNT)

    def total(q, keys, entry, sink):
        out = attend(
            q, places, stack(keys), held._replace(stack=stack(entry)), index, sink,
            window=WINDOW, scale=SCALE,
        )  # fmt: skip
        return (out * weights).sum()

    visible = compressed_attention.visible(places, held)
    scores = jnp.einsum("btiy,bzy->btiz", INDEX_Q, INDEX_KEY)
    scores = jnp.einsum("bti,btiz->btz", W, jax.nn.relu(scores))
    ranks = jnp.argsort(jnp.argsort(-jnp.where(visible, scores, -jnp.inf)))
    age = own[:, :, None] - own[:, None]
    near = (age >= 0) & (age < WINDOW) & (own[:, None] >= FIRST[:, :, None])
    seen = jnp.concatenate([near, visible & (ranks < COUNT)], axis=-1)[:, :, None]

    def defined(q, keys, entry, sink):
        both = jnp.concatenate([keys, entry], axis=1)
        logits = jnp.einsum("btnh,bsh->btns", q, both) * SCALE
        logits = jnp.where(seen, logits, -jnp.inf)
        sinks = jnp.broadcast_to(sink[None, None, :, None], (B, T, N, 1))
        shares = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1))[..., :-1]
        return (jnp.einsum("btns,bsh->btnh", shares, both) * weights).sum()

    inputs = [jnp.asarray(x) for x in (Q, KEYS, ENTRY, SINK)]
    got, want = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(*inputs) for f in (total, defined))
    for name, *pair in zip(("queries", "tokens", "entries", "sink"), got, want, strict=True):
        assert_close(*pair, F32, name)


def test_gathered_entries_equal_masked_ones(monkeypatch):
    want = run()
    monkeypatch.setattr(compressed_attention, "_DENSE", 1)
    assert_close(run(), want, F32)


def test_one_query_gathers_the_same(monkeypatch):
    want = run()
    for place in (0, 3, 13):
        assert_close(run(queries=slice(place, place + 1)), want[:, place : place + 1], F32)


@pytest.mark.parametrize("most", [B * I * 10, B * I * 40])
def test_tiles_of_queries_change_nothing(most, monkeypatch):
    want = run()
    monkeypatch.setattr(compressed_attention, "_MOST", most)
    assert_close(run(), want, F32)


def test_choosing_all_entries_is_no_choice():
    assert_close(run(count=7), run(indexed=False), F32)

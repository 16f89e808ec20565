"""The choice of keys, and attention to them, against NumPy with loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from dsjax.kernels import sparse_attention
from dsjax.kernels.flash_attention import Segments
from dsjax.kernels.sparse_attention import (
    Index,
    Shard,
    chosen,
    gathered_attention,
    index_scores,
    latent_attention,
    masked_attention,
    scored_at_once,
    scores_in_blocks,
    select,
)
from dsjax.kernels.target import Target
from tests.closeness import F32, assert_close
from tests.oracles.attention import chosen as oracle_chosen
from tests.oracles.attention import visible

B, T, N, H, W, HEADS, WIDTH, COUNT = 2, 40, 3, 8, 6, 5, 4, 7
SEGMENTS = np.stack([np.repeat([1, 2, 3], [11, 20, 9]), np.repeat([1, 2], [33, 7])]).astype(
    np.int32
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def arrays():
    """Queries, keys, values; queries, weights and keys of the index."""
    shapes = ((B, T, N, H), (B, T, N, H), (B, T, N, W), (B, T, HEADS, WIDTH), (B, T, HEADS))
    made = [normal(seed, *shape) for seed, shape in enumerate((*shapes, (B, T, WIDTH)))]
    return made[:3], Index(*made[3:])


def scores_with_ties(rows=9, keys=50):
    scores = np.round(normal(0, B, rows, keys), 1)  # many are equal, and a tenth are zero
    scores[np.random.default_rng(1).random(scores.shape) < 0.1] = 0.0
    scores[0, 0, ::2] = -0.0
    seen = np.tril(np.ones((keys, keys), bool))[-rows:] & np.ones((B, 1, 1), bool)
    seen[1, :, :20] = False
    seen[1, -1, 24:] = False
    return scores, seen


@pytest.mark.parametrize("count", [1, 6, 24, 49, 50, 64])
def test_both_choices_are_the_best_visible_keys(count):
    scores, seen = scores_with_ties()
    selection = jax.jit(select, static_argnums=2)(scores, seen, count)
    mask = np.asarray(jax.jit(chosen, static_argnums=2)(scores, seen, count))
    for b in range(B):
        want = oracle_chosen(scores[b], seen[b], count)
        np.testing.assert_array_equal(mask[b], want)
        for t in range(scores.shape[1]):
            mine = np.asarray(selection.indices_BTJ[b, t])[np.asarray(selection.valid_BTJ[b, t])]
            assert sorted(mine) == np.flatnonzero(want[t]).tolist()


def test_scores_may_be_negative_and_zero_is_a_score():
    scores = np.array([[[-3.0, 0.0, -1.0, 0.5]]], np.float32)
    mask = chosen(jnp.asarray(scores), jnp.ones(scores.shape, bool), 3)
    assert np.asarray(mask)[0, 0].tolist() == [False, True, True, True]
    index = Index(np.full((1, 1, 2, 1), 2.0, np.float32), np.array([[[1.0, -3.0]]], np.float32),
                  np.array([[[1.0], [-1.0]]], np.float32))  # fmt: skip
    assert np.asarray(index_scores(index))[0, 0].tolist() == [-4.0, 0.0]


@pytest.mark.parametrize("n_blocks", [1, 3])
def test_scores_in_blocks_are_scores_up_to_the_last_block(n_blocks):
    """The last of three blocks of 15 keys begins at the 26th."""
    index = arrays()[1]
    read = functools.partial(lax.dynamic_slice_in_dim, index.k_BSY, axis=1)
    got = jax.jit(
        lambda n_blocks: scores_in_blocks(*index[:2], read, T, size=15, n_blocks=n_blocks)
    )(n_blocks)
    scored = min(15 * n_blocks, T)
    assert_close(got[..., :scored], index_scores(index)[..., :scored], F32, "scores")
    assert not np.asarray(got[..., scored:]).any()


@pytest.mark.parametrize(
    ("heads", "n_queries", "n_keys", "want"),
    [
        (8, 512, 65536, (16, 1024)),
        (8, 1, 65536, (1, 16384)),
        (8, 1, 4096, (1, 4096)),
        (1 << 20, 512, 65536, (1, 1024)),
        (8, 512, 1 << 24, (1, 16384)),
    ],
)
def test_products_of_a_tile_are_bounded(heads, n_queries, n_keys, want):
    assert scored_at_once(Target("cpu"), heads, n_queries, n_keys) == want


def reference(qkv, index, segments, count, *, warmup=False):
    """Float64, one row, query and head after the other: output, and each query's divergence."""
    (q, k, v), index = (x.astype(np.float64) for x in qkv), Index(*map(np.float64, index))
    out, divergence = np.zeros((B, T, N, W)), np.zeros((B, T))
    for b in range(B):
        products = np.maximum(np.einsum("tiy,sy->tis", index.q_BTIY[b], index.k_BSY[b]), 0)
        scores = (index.w_BTI[b][:, :, None] * products).sum(axis=1)
        seen = visible(segments[b])
        mask = seen if warmup else oracle_chosen(scores, seen, count)
        for t in range(T):
            keys = np.flatnonzero(mask[t])
            weights = np.exp(np.einsum("nh,snh->ns", q[b, t], k[b, keys]) * 0.3)
            weights /= weights.sum(axis=1, keepdims=True)
            out[b, t] = np.einsum("ns,snw->nw", weights, v[b, keys])
            found = np.exp(scores[t, keys] - scores[t, keys].max())
            wanted = weights.sum(axis=0) / weights.sum()
            divergence[b, t] = (wanted * np.log(wanted / (found / found.sum()))).sum()
    return out, divergence


def attend(qkv, index, segments=None, **given):
    both = None if segments is None else Segments(segments, segments)
    return masked_attention(*qkv, index, count=COUNT, scale=0.3, segments=both, **given)


@pytest.mark.parametrize("most", [2**24, 5 * B * T * HEADS])
@pytest.mark.parametrize("isolated", [False, True])
def test_masked_attention_equals_reference(isolated, most, monkeypatch):
    monkeypatch.setattr(sparse_attention, "_MOST", most)  # the smaller one: tiles of five queries
    qkv, index = arrays()
    segments = SEGMENTS if isolated else np.ones((B, T), np.int32)
    got, divergence = jax.jit(functools.partial(attend, lesson="sparse"))(qkv, index, segments)
    want, wanted_divergence = reference(qkv, index, segments, COUNT)
    assert_close(got, want, F32, "attention")
    assert_close(divergence, wanted_divergence, F32, "divergence")


def test_warm_up_learns_from_attention_to_all_keys():
    qkv, index = arrays()
    segments = np.ones((B, T), np.int32)
    got, divergence = jax.jit(functools.partial(attend, lesson="warmup"))(qkv, index)
    want, wanted_divergence = reference(qkv, index, segments, COUNT, warmup=True)
    assert_close(got, want, F32, "attention")
    assert_close(divergence, wanted_divergence, F32, "divergence")


def test_order_of_the_queries_does_not_matter(monkeypatch):
    monkeypatch.setattr(sparse_attention, "_MOST", 6 * B * T * HEADS)
    qkv, index = arrays()
    places = np.random.default_rng(5).permutation(T).astype(np.int32)
    moved = (
        (qkv[0][:, places], *qkv[1:]),
        Index(index.q_BTIY[:, places], index.w_BTI[:, places], index.k_BSY),
    )
    both = Segments(SEGMENTS[:, places], SEGMENTS)

    @jax.jit
    def run(qkv, index):
        return masked_attention(
            *qkv, index, count=COUNT, scale=0.3, segments=both, lesson="sparse",
            shard=Shard(jnp.asarray(places), ((T, T),)),
        )  # fmt: skip

    want, divergence = jax.jit(functools.partial(attend, lesson="sparse"))(qkv, index, SEGMENTS)
    got, got_divergence = run(*moved)
    assert_close(got, np.asarray(want)[:, places], F32, "attention")
    assert_close(got_divergence, np.asarray(divergence)[:, places], F32, "divergence")


def test_gathered_attention_equals_masked_attention():
    (q, _, _), index = arrays()
    k, v = normal(7, B, T, H), normal(8, B, T, W)  # one head of keys for all

    @jax.jit
    def gathered(q, index):
        causal = jnp.tril(jnp.ones((T, T), bool))[None] & jnp.ones((B, 1, 1), bool)
        selection = select(index_scores(index), causal, COUNT)
        rows = jnp.arange(B, dtype=jnp.int32)[:, None, None]
        keys, values = (jnp.asarray(x)[rows, selection.indices_BTJ] for x in (k, v))
        halves = (q[..., :3], q[..., 3:]), (keys[..., :3], keys[..., 3:])
        return gathered_attention(*halves, values, selection.valid_BTJ, scale=0.3).out_BTNW

    every_head = [np.repeat(x[:, :, None], N, axis=2) for x in (k, v)]
    want, _ = jax.jit(attend)((q, *every_head), index)
    assert_close(gathered(q, index), want, F32, "attention")


def latents(qkv, index, *, at_once, monkeypatch, segments=None, **given):
    """`latent_attention` and `masked_attention` of the same keys, a head of which is the value."""
    monkeypatch.setattr(sparse_attention, "_MOST_GATHERED", {"cpu": at_once})
    q, k, _ = qkv
    kv = k[:, :, 0]
    both = None if segments is None else Segments(segments, segments)
    common = {"count": COUNT, "scale": 0.3, "segments": both, **given}

    def gathered(q, kv, index):
        return latent_attention(q, kv, index, width=W, target=Target("cpu"), **common)

    def masked(q, kv, index):
        k_BSNH = jnp.broadcast_to(kv[:, :, None], (B, T, N, H))
        return masked_attention(q, k_BSNH, k_BSNH[..., :W], index, **common)

    return (gathered, masked), (q, kv, index)


@pytest.mark.parametrize("at_once", [1, 5 * B * COUNT * (H + WIDTH), 2**24])
@pytest.mark.parametrize("isolated", [False, True])
def test_latent_attention_has_the_values_and_gradients_of_masked(isolated, at_once, monkeypatch):
    """For one query at a time, five, and all."""
    segments = jnp.asarray(SEGMENTS) if isolated else None
    ways, inputs = latents(
        *arrays(), at_once=at_once, monkeypatch=monkeypatch, segments=segments, lesson="sparse"
    )
    weights = normal(11, B, T, N, W), normal(12, B, T)

    def total(way, *inputs):
        out = way(*inputs)
        return sum((x * w).sum() for x, w in zip(out, weights, strict=True)), out

    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(total, way), argnums=(0, 1, 2), has_aux=True))(
            *inputs
        )
        for way in ways
    )
    assert_close(got[0][1][0], want[0][1][0], F32, "attention")
    assert_close(got[0][1][1], want[0][1][1], F32, "divergence")
    names = ("queries", "latents", *Index._fields)
    for name, *parts in zip(names, *map(jax.tree.leaves, (got[1], want[1])), strict=True):
        assert_close(*parts, F32, f"gradient of {name}")


def test_latent_attention_without_lesson_has_no_gradient_of_the_index(monkeypatch):
    (gathered, masked), inputs = latents(*arrays(), at_once=1, monkeypatch=monkeypatch)
    out, divergence = jax.jit(gathered)(*inputs)
    assert divergence is None
    assert_close(out, jax.jit(masked)(*inputs)[0], F32, "attention")
    total = jax.jit(jax.grad(lambda index: gathered(*inputs[:2], index)[0].sum()))
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(total(inputs[2])))


@pytest.mark.parametrize("lesson", ["warmup", "sparse"])
def test_divergence_has_the_gradient_of_the_index_alone(lesson):
    qkv, index = arrays()
    total = jax.jit(
        lambda qkv, index: attend(qkv, index, jnp.asarray(SEGMENTS), lesson=lesson)[1].sum()
    )
    of_main, of_index = jax.jit(jax.grad(total, argnums=(0, 1)))(tuple(qkv), index)
    assert all(not np.asarray(leaf).any() for leaf in of_main)
    # Differences are of float64: wider steps would cross many zeros of relu.
    for name, part in index._asdict().items():
        direction, step = normal(9, *part.shape).astype(np.float64), 1e-6
        ends = [
            reference(
                qkv,
                index._replace(**{name: part + sign * step * direction}),
                SEGMENTS,
                COUNT,
                warmup=lesson == "warmup",
            )[1].sum()
            for sign in (1, -1)
        ]
        along = float((np.asarray(getattr(of_index, name)) * direction).sum())
        np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-5)


def test_attention_has_no_gradient_of_the_index():
    qkv, index = arrays()
    gradient = jax.jit(jax.grad(lambda index: attend(qkv, index)[0].sum()))(index)
    assert all(not np.asarray(leaf).any() for leaf in gradient)


@pytest.mark.parametrize("lesson", ["warmup", "sparse"])
def test_no_array_holds_all_pairs(lesson, monkeypatch):
    """Neither forward nor backward: 4,096 queries and keys of one head."""
    monkeypatch.setattr(sparse_attention, "_MOST", 2**18)
    length = 4096
    shapes = [(1, length, 1, H), (1, length, 1, H), (1, length, 1, W)]
    shapes += [(1, length, 2, WIDTH), (1, length, 2), (1, length, WIDTH)]
    *qkv, q, w, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def total(qkv, index):
        out, divergence = masked_attention(*qkv, index, count=64, scale=1.0, lesson=lesson)
        return out.sum() + divergence.sum()

    traced = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(tuple(qkv), Index(q, w, k))
    assert 2**16 < max(_sizes(traced.jaxpr)) <= 2**18


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (out.aval.size for out in equation.outvars if hasattr(out.aval, "size"))
        for inner in jaxprs_in_params(equation.params):
            yield from _sizes(inner)

"""Choosing blocks and attending to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsjax.kernels import native_sparse as kernel
from dsjax.kernels.native_sparse import Branch, Pattern, Queries, Stack
from dsjax.kernels.sparse_attention import Selection
from dsjax.kernels.target import Target
from tests.closeness import F32, assert_close
from tests.oracles.kernels import reference_attention

SIZES = Pattern(length=8, stride=4, size=8, blocks=4, window=6)
B, T, S, N, P, H, W = 2, 5, 50, 4, 2, 6, 3
FIRST = (0, 13)  # where the document of each row's queries begins


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def branch(seed, length=S):
    return Branch(
        Stack(normal(seed, 3, B, P, length, H), 1), Stack(normal(seed + 1, 3, B, P, length, W), 1)
    )


def queries(begin=38, count=T, first=FIRST):
    places = jnp.broadcast_to(begin + jnp.arange(count, dtype=jnp.int32)[None], (B, count))
    begins = jnp.broadcast_to(jnp.asarray(first, jnp.int32)[:, None], (B, count))
    return Queries(normal(9, B, count, N, H), places, begins, normal(8, B, count, N, 3))


def of_sequence(seed):
    """A branch that has the queries' whole rows; and its keys and values, [B, T, P, X]."""
    both = normal(seed, B, 30, P, H), normal(seed + 1, B, 30, P, W)
    return Branch(*(Stack(x.swapaxes(1, 2)[None], 0) for x in both)), both


def scores_of(seed, n_blocks=-(-S // SIZES.size)):
    return jax.nn.softmax(normal(seed, B, T, P, n_blocks))


def test_selection_holds_the_first_and_the_nearest_blocks_and_the_best_others():
    scores = scores_of(0)
    indices, valid = kernel.select(scores, queries(), SIZES)
    assert indices.shape == valid.shape == (B, T, P, SIZES.blocks)
    for row, t, group in np.ndindex(B, T, P):
        own = (38 + t - FIRST[row]) // SIZES.size
        blocks = np.asarray(indices[row, t, group])[np.asarray(valid[row, t, group])]
        assert len(set(blocks.tolist())) == len(blocks) == min(own + 1, SIZES.blocks)
        assert {0, own, max(own - 1, 0)} <= set(blocks.tolist())
        others = np.asarray(scores[row, t, group])[1 : max(own - 1, 1)]
        if len(others):
            assert int(others.argmax()) + 1 in blocks


def test_blocks_after_the_query_are_not_valid():
    _, valid = kernel.select(scores_of(0), queries(begin=9, first=(0, 9)), SIZES)
    numbers = np.asarray(valid).sum(axis=-1)
    np.testing.assert_array_equal(
        numbers, np.array([2, 1])[:, None, None] * np.ones((B, T, P), int)
    )


@pytest.mark.parametrize(("begin", "count"), [(38, T), (44, 1), (0, 4)])
def test_gathered_attention_equals_masked(begin, count):
    """Also where the last block ends after the row, and before a query has any choice."""
    asked, keys = queries(begin, count, FIRST if begin else (0, 0)), branch(1)
    selection = kernel.select(scores_of(2)[:, :count], asked, SIZES)
    ways = [
        attention(asked, keys, selection, size=SIZES.size, scale=0.4)
        for attention in (kernel.gathered_attention, kernel.masked_attention)
    ]
    assert_close(ways[0], ways[1], F32, "attention")
    none = Selection(selection[0], jnp.zeros_like(selection[1]))
    np.testing.assert_array_equal(
        kernel.gathered_attention(asked, keys, none, size=SIZES.size, scale=0.4), 0
    )


@pytest.mark.heavy
def test_the_tpus_kernel_has_the_values_and_gradients_of_the_gathered_form():
    """Documents that begin at multiples of a block, queries that see less than they choose."""
    asked, keys = queries(14, T, (0, 8)), branch(1, length=48)
    selection = kernel.select(scores_of(2, n_blocks=6), asked, SIZES)
    weights = normal(4, B, T, N, W)

    def run(attention):
        def total(q, k, v):
            stacks = Branch(
                *(stack._replace(stack_LBPSX=x) for stack, x in zip(keys, (k, v), strict=True))
            )
            out = attention(asked._replace(q_BTNH=q), stacks, selection, SIZES.size, 0.4)
            return (out * weights).sum(), out

        inputs = (asked.q_BTNH, *(stack.stack_LBPSX for stack in keys))
        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*inputs)

    with pltpu.force_tpu_interpret_mode():
        got = run(kernel.table_attention)
    want = run(kernel.gathered_attention)
    for number, parts in enumerate(zip(*map(jax.tree.leaves, (got, want)), strict=True)):
        assert_close(*parts, F32, f"result {number}")


@pytest.mark.parametrize(
    "attention", [kernel.gathered_attention, kernel.masked_attention], ids=["gathered", "masked"]
)
def test_selection_of_everything_is_dense_attention(attention):
    asked = queries(0, 30, (0, 0))
    keys, (k, v) = of_sequence(3)
    blocks = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (B, 30, P, 4))
    own = asked.places_BT[:, :, None, None] // SIZES.size
    got = attention(asked, keys, Selection(blocks, blocks <= own), size=SIZES.size, scale=0.4)
    assert_close(got, reference_attention(asked.q_BTNH, k, v, scale=0.4), F32, "attention")


def test_window_over_everything_is_dense_attention():
    asked = queries(0, 30, (0, 0))
    keys, (k, v) = of_sequence(5)
    wanted = reference_attention(asked.q_BTNH, k, v, scale=0.4)
    assert_close(kernel.window_attention(asked, keys, window=30, scale=0.4), wanted, F32, "all")
    short = kernel.window_attention(asked, keys, window=6, scale=0.4)
    assert_close(short[:, :6], wanted[:, :6], F32, "the first tokens")
    last = jax.tree.map(lambda x: x[:, 24:], (k, v))
    alone = reference_attention(asked.q_BTNH[:, 24:], *last, scale=0.4)[:, -1]
    assert_close(short[:, -1], alone, F32, "the last token")


def test_entries_of_everything_are_dense_attention_over_them():
    asked = queries()
    keys, seen = branch(7, length=12), jnp.ones((B, T, 12), bool)
    got, probabilities = kernel.compressed_attention(asked.q_BTNH, keys, seen, 0.4)
    k, v = (jnp.repeat(stack.whole(), N // P, axis=1) for stack in keys)
    weights = jax.nn.softmax(jnp.einsum("BTNH,BNZH->BTNZ", asked.q_BTNH, k) * 0.4)
    assert_close(got, jnp.einsum("BTNZ,BNZW->BTNW", weights, v), F32, "attention")
    shared = weights.reshape(B, T, P, N // P, 12).sum(axis=3)
    assert_close(probabilities, shared, F32, "probabilities")


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("length", [4, 8, 12])
def test_importance_of_a_block_is_the_sum_over_its_entries(size, length):
    sizes = SIZES._replace(size=size, length=length)
    first = np.array([[0], [13]], np.int32)
    p = np.asarray(jax.nn.softmax(normal(0, B, 1, P, 12)))
    got = kernel.importance(jnp.asarray(p), jnp.asarray(first), sizes, 5)
    for row, group, block in np.ndindex(B, P, 5):
        total, shift = 0.0, int(first[row, 0]) // sizes.stride
        for m in range(size // 4):
            for n in range(length // 4):
                entry = size // 4 * block + m - n
                if 0 <= entry and shift + entry < 12:
                    total += float(p[row, 0, group, shift + entry])
        assert float(got[row, 0, group, block]) == pytest.approx(total, rel=1e-5, abs=1e-7)


def attend(asked, **keywords):
    begins = jnp.broadcast_to(4 * jnp.arange(12, dtype=jnp.int32), (B, 12))
    return kernel.attend(
        asked, branch(11, 12), begins, branch(13), branch(15), pattern=SIZES, scale=0.4,
        target=Target("cpu"), **keywords
    )  # fmt: skip


def test_query_that_sees_no_entry_gets_nothing_from_them():
    """0 and a gradient of 0, where a softmax of nothing would be NaN."""
    asked = queries(0, 30, (0, 0))
    only = asked._replace(gates_BTN3=asked.gates_BTN3 * jnp.asarray([1.0, 0, 0])[None, None, None])
    np.testing.assert_array_equal(attend(only)[:, : SIZES.length - 1], 0)
    assert (np.asarray(attend(only)[:, SIZES.length - 1]) != 0).all()
    gradient = jax.grad(lambda q: attend(only._replace(q_BTNH=q)).sum())(only.q_BTNH)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, : SIZES.length - 1], 0)


@pytest.mark.parametrize("part", [None, 10])
@pytest.mark.parametrize("gathered", [False, True])
def test_tiles_of_queries_change_nothing(part, gathered, monkeypatch):
    """Tiles that do not divide the queries, in parts that are not in order."""
    asked = queries(0, 30, (0, 0))
    if part:
        order = jnp.asarray([*range(20, 30), *range(10), *range(10, 20)])
        asked = jax.tree.map(lambda x: x[:, order], asked)

    def run(asked):
        return jax.value_and_grad(
            lambda q: (attend(asked._replace(q_BTNH=q), part=part) ** 2).sum()
        )(asked.q_BTNH)

    monkeypatch.setattr(kernel, "_DENSE", 0 if gathered else 100)
    if not part:
        want = run(asked)
        monkeypatch.setattr(kernel, "_MOST", 7 * B * N * S)
    else:
        want = run(jax.tree.map(lambda x: x[:, jnp.argsort(order)], asked))
        monkeypatch.setattr(kernel, "_MOST", 3 * B * N * S)
    value, gradient = run(asked)
    if part:
        want = want[0], want[1][:, order]
    assert_close(value, want[0], F32, "value")
    assert_close(gradient, want[1], F32, "gradient")

"""Split sequences: equal work, equal numbers, little to gather."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Config, DataConfig, PrecisionConfig, TrainConfig
from dsjax.generate.engine import Engine, Request
from dsjax.kernels.target import Target
from dsjax.model import rope
from dsjax.model.parameters import shardings
from dsjax.parallel import context
from dsjax.parallel.mesh import make_mesh
from dsjax.train.batches import place_all
from dsjax.train.loss import pretraining
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY, tiny_model, tokens
from tests.oracles.kernels import reference_attention
from tests.train.objectives import sums_of

pytestmark = pytest.mark.heavy

LENGTH = 32


@pytest.mark.parametrize("n_parts", [2, 4])
def test_every_device_lists_equally_many_tiles_and_all_that_its_queries_see(n_parts, monkeypatch):
    monkeypatch.setattr(context, "_MOST_BLOCK", 2)
    order = context.order(LENGTH, n_parts)
    np.testing.assert_array_equal(np.sort(order), np.arange(LENGTH))
    blocks_RI, pairs_RX2 = context.tile_tables(LENGTH, n_parts)
    size = LENGTH // blocks_RI.size
    assert size == 2
    for blocks_I, pairs_X2, own in zip(
        blocks_RI, pairs_RX2, order.reshape(n_parts, -1), strict=True
    ):
        np.testing.assert_array_equal(blocks_I, own[::size] // size)
        listed = {(int(blocks_I[place]), int(key)) for place, key in pairs_X2}
        assert len(listed) == len(pairs_X2)
        assert listed == {(block, key) for block in blocks_I for key in range(block + 1)}


def test_chunks_of_a_prime_length_have_tiles_as_large_as_others():
    """521 tokens are two tiles of 261 places, as 522 are; by divisors they would be 521 tiles."""
    blocks_RI, pairs_RX2 = context.tile_tables(2 * 2 * 521, 2)
    assert blocks_RI.tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert pairs_RX2.shape == (2, 18, 2)
    for length, n_tiles in [(512, 1), (513, 2), (16381, 32)]:
        assert context.tile_tables(2 * 2 * length, 2)[0].shape == (2, 2 * n_tiles)


def test_length_that_does_not_divide_is_refused():
    mesh = make_mesh({"data": 2, "context": 4})
    context.check_length(24, mesh)
    context.check_length(7, make_mesh({"data": 8}))
    with pytest.raises(
        ValueError, match=r"sequence_length=28 does not divide .* mesh\.context=4 .* multiple of 8$"
    ):
        context.check_length(28, mesh)


def _qkv(length, packed):
    rng = np.random.default_rng(0)
    shapes = [(2, length, 4, 8), (2, length, 6), (6, 4 * 14)]
    segments = np.array([[1] * 10 + [2] * 22, [1] * 17 + [2] * 15], np.int32)[:, :length]
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    return arrays, jnp.asarray(segments) if packed else None


def _expand(c_BSC, weight):
    expanded = jnp.matmul(c_BSC, weight).reshape(*c_BSC.shape[:2], -1, 14)
    return expanded[..., :8], expanded[..., 8:]


def _arranged(x, n_parts):
    return None if x is None else x[:, context.order(x.shape[1], n_parts)]


def _on_mesh(sizes, length=LENGTH, packed=True):
    """Output and gradients of attention on a mesh, back in the sequence's order."""
    (q, c, weight), segments = _qkv(length, packed)
    n_parts = sizes["context"]

    def total(q, c, weight):
        out = context.attend(
            _arranged(q, n_parts),
            (_arranged(c, n_parts),),
            weight,
            _expand,
            scale=0.3,
            segment_ids_BT=_arranged(segments, n_parts),
            target=Target("cpu"),
        )
        return _weighted(context.restore(out)), context.restore(out)

    with jax.set_mesh(make_mesh(sizes)):
        return jax.tree.leaves(jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, c, weight))


def _whole(length=LENGTH, packed=True):
    (q, c, weight), segments = _qkv(length, packed)

    def total(q, c, weight):
        k, v = _expand(c, weight)
        out = reference_attention(q, k, v, scale=0.3, segment_ids_BT=segments)
        return _weighted(out), out

    return jax.tree.leaves(jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, c, weight))


def _weighted(out):
    return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape))).sum()


def _assert_same(got, want):
    for name, g, w in zip(("dq", "dc", "dweight", "out"), got, want, strict=True):
        assert_close(g, w, F32, name)


def test_split_attention_equals_whole_attention():
    _assert_same(_on_mesh({"data": 2, "context": 2, "tensor": 2}), _whole())


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_that_are_filled_up_change_nothing(packed, monkeypatch):
    """Chunks of 7 tokens in tiles of 3."""
    monkeypatch.setattr(context, "_MOST_BLOCK", 3)
    given = 28, packed
    _assert_same(_on_mesh({"data": 2, "context": 2, "tensor": 2}, *given), _whole(*given))


@pytest.mark.slow
def test_devices_with_the_tiles_of_others_are_found_out(monkeypatch):
    right = context.tile_tables
    monkeypatch.setattr(
        context, "tile_tables", lambda *given: tuple(table[::-1] for table in right(*given))
    )
    with pytest.raises(AssertionError, match=r"out|dq"):
        _assert_same(_on_mesh({"data": 2, "context": 4}), _whole())


@pytest.mark.slow
def test_generation_ignores_the_split():
    """Tokens are few then, and none of them moves."""
    model, prompt = tiny_model(), tuple(range(3, 30))
    mesh = make_mesh({"expert": 2, "context": 2}, 4)
    sharded = jax.tree.map(jax.device_put, model, shardings(model, mesh))
    want, got = (
        [token for (new,) in Engine(m).generate([Request(prompt, 9)]) for token in new]
        for m in (model, sharded)
    )
    assert len(want) == 9 and got == want


CONFIG = Config(
    name="x",
    model=TINY,
    data=DataConfig(sequence_length=LENGTH),
    train=TrainConfig(batch_size=8, loss_chunk=64, sequence_balance=0.01, remat="selective"),
    precision=PrecisionConfig(compute="float32"),
)


def _compute(function, sizes):
    """A function of the tiny model and a batch of packed documents with padding, on a mesh."""
    rows = np.asarray(tokens(8, LENGTH + 1))
    segments = np.where(np.arange(LENGTH + 1)[None] < 19, 1, 2) * np.ones_like(rows)
    segments[0, 25:] = 0
    mesh = make_mesh(sizes, int(np.prod(list(sizes.values()))))
    model = tiny_model()  # made under no mesh, for all of them
    with jax.set_mesh(mesh):
        batch = place_all({"tokens": rows, "segment_ids": segments}, mesh)
        return jax.tree.map(np.asarray, jax.jit(function)(model, batch))


def _losses(model, batch):
    """The sums of a batch and what its layers routed."""
    sums, routing = sums_of(pretraining(CONFIG), model, batch)
    return sums | routing._asdict()


def _gradients(model, batch):
    def total(model):
        sums = _losses(model, batch)
        return sums["main"] + 0.3 * sums["mtp"] + 1000 * sums["balance_loss"].sum()

    return jax.grad(total, allow_int=True)(model)


def _assert_same_losses(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_close(got[name], value, F32, name)
    np.testing.assert_array_equal(got["counts_E"], want["counts_E"])


@pytest.fixture(scope="module")
def whole_losses():
    return _compute(_losses, {"data": 1})


def test_split_sequences_lose_what_whole_ones_do(whole_losses):
    _assert_same_losses(_compute(_losses, {"data": 2, "expert": 2, "context": 2}), whole_losses)


@pytest.mark.slow
def test_shards_that_see_wrong_positions_are_found_out(whole_losses, monkeypatch):
    right = rope.angles

    def wrong(positions_BT, config):
        return right(jnp.roll(positions_BT, LENGTH // 2, axis=1), config)

    monkeypatch.setattr(rope, "angles", wrong)
    with pytest.raises(AssertionError):
        _assert_same_losses(_compute(_losses, {"context": 2}), whole_losses)


@pytest.fixture(scope="module")
def whole_gradients():
    return _compute(_gradients, {"data": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "expert": 2, "context": 2},
        {"context": 8},
        {"fsdp": 2, "context": 2, "tensor": 2},
    ],
    ids=str,
)
def test_split_sequences_learn_what_whole_ones_do(sizes, whole_gradients):
    leaves = jax.tree_util.tree_leaves_with_path
    got, want = leaves(_compute(_gradients, sizes)), leaves(whole_gradients)
    for (path, g), (_, w) in zip(got, want, strict=True):
        assert_close(g, w, F32._replace(bound=5e-5), jax.tree_util.keystr(path))


def test_gathered_is_the_latent_and_not_what_is_made_of_it():
    """Forward and backward: nothing as long as a sequence and wide as heads travels."""
    model = jax.tree.map(lambda stack: stack[0], tiny_model().dense_layers.attn)
    x_BTD = jnp.zeros((1, LENGTH, TINY.dim))

    def total(model, x_BTD):
        positions = context.arrange(jnp.arange(LENGTH)[None])
        return model(x_BTD, rope.angles(positions, TINY)).sum()

    with jax.set_mesh(make_mesh({"context": 8})):
        text = str(jax.jit(jax.grad(total, (0, 1))).lower(model, x_BTD).compile().as_text())
    travels = [
        [int(size) for size in found.split(",") if size]
        for found in re.findall(
            r"f32\[([\d,]*)\]\S* (?:all-gather|reduce-scatter|all-reduce)\(", text
        )
    ]
    assert travels
    kept = TINY.kv_lora_rank + TINY.qk_rope_head_dim
    heads = TINY.n_heads * TINY.qk_head_dim
    sequences = [shape for shape in travels if LENGTH in shape]
    assert sequences and all(np.prod(shape) <= LENGTH * kept for shape in sequences)
    assert LENGTH * kept < LENGTH * heads

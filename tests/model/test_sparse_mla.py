"""DeepSeek sparse attention in a layer and a model: whole sequences, caches, meshes, learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from dsjax.generate.engine import Engine
from dsjax.generate.request import Request
from dsjax.generate.sampling import Sampling
from dsjax.kernels import sparse_attention
from dsjax.model import rope, sparse_mla
from dsjax.model.cache import empty_cache
from dsjax.model.inputs import read_tokens
from dsjax.model.mla import MLA
from dsjax.model.parameters import shardings
from dsjax.model.sparse_mla import SparseMLA
from dsjax.parallel.context import restore
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from tests.closeness import EXACT, F32, LOGITS, assert_close
from tests.model.test_mla import _tree as tree_of
from tests.model.tiny import TINY, filled, tiny_model, tokens
from tests.oracles.attention import mla as oracle

LENGTH, COUNT = 40, 9
INDEXED = {"index_n_heads": 16, "index_head_dim": 12}
CONFIG = dataclasses.replace(TINY, **INDEXED, index_topk=COUNT, n_mtp=1)
# One layer without experts compiles fast.
PLAIN = dataclasses.replace(
    CONFIG, n_layers=1, n_dense_layers=1, n_routed_experts=0, router_bias=False, n_mtp=0
)
SEGMENTS = np.repeat(np.array([1, 2, 3], np.int32), [7, 20, 13])


def hidden():
    return jnp.asarray(np.random.default_rng(0).normal(size=(1, LENGTH, TINY.dim)), jnp.float32)


@jax.jit
def apply(module, x_BTD, segments_BT):
    positions_BT = rope.positions_in_segments(segments_BT)
    return module(x_BTD, rope.angles(positions_BT, CONFIG), segments_BT)


@pytest.mark.parametrize("gathers", [False, True], ids=["masked", "gathered"])
@pytest.mark.parametrize("segments", [np.ones(LENGTH, np.int32), SEGMENTS], ids=["one", "packed"])
def test_layer_equals_oracle(segments, gathers, monkeypatch):
    """A query neither sees nor counts keys of other documents."""
    monkeypatch.setattr(SparseMLA, "gathers", lambda *_: gathers)
    apply.clear_cache()
    module, x_BTD = filled(SparseMLA, CONFIG), hidden()
    got = apply(module, x_BTD, segments[None])[0]
    want = oracle(np.asarray(x_BTD[0], np.float64), tree_of(module), CONFIG, segments)
    assert_close(got, want, F32, "attention")
    dense = oracle(np.asarray(x_BTD[0], np.float64), tree_of(module), TINY, segments)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(got, dense)


def test_long_sequences_are_gathered_where_it_takes_fewer_multiplications():
    v3_2 = dataclasses.replace(
        TINY, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        index_n_heads=16, index_head_dim=128, index_topk=2048,
    )  # fmt: skip
    # 2,048 keys of 1,088 channels against half of the sequence, of 320.
    module = SparseMLA(v3_2, Policy(jnp.float32))
    assert not module.gathers(13_926) and module.gathers(13_928)


def dense_twin(model):
    """The same model without its indexers."""
    config = dataclasses.replace(model.config, index_n_heads=0, index_head_dim=0, index_topk=0)
    twin = tiny_model(config)
    own = {jax.tree_util.keystr(k): leaf for k, leaf in jax.tree_util.tree_leaves_with_path(model)}
    return jax.tree_util.tree_map_with_path(lambda k, _: own[jax.tree_util.keystr(k)], twin)


def test_choosing_all_keys_is_v3_to_the_bit():
    sparse = tiny_model(dataclasses.replace(PLAIN, index_topk=LENGTH))
    dense, row = dense_twin(sparse), tokens(2, LENGTH)
    run = jax.jit(lambda model: model(row))
    assert_close(run(sparse), run(dense), EXACT, "logits")

    @jax.jit
    def extend(model):
        cache = empty_cache(model.config, 2, LENGTH, jnp.float32)
        return model.extend(row, jnp.zeros(2, jnp.int32), cache).main_BTD

    assert_close(extend(sparse), extend(dense), EXACT, "hidden states")


def decoded(model, row, chunks, length=64):
    """Logits of a row that is added to a cache in chunks."""

    @jax.jit
    def extend(model, tokens_BT, start, cache):
        extended = model.extend(tokens_BT, jnp.full(len(tokens_BT), start), cache)
        return model.logits(extended.main_BTD), extended.cache

    cache, start, logits = empty_cache(model.config, len(row), length, jnp.float32), 0, []
    for size in chunks:
        part, cache = extend(model, row[:, start : start + size], jnp.int32(start), cache)
        logits.append(part)
        start += size
    return jnp.concatenate(logits, axis=1)


@pytest.fixture(scope="module")
def whole():
    return jax.jit(lambda model: model(tokens(2, LENGTH)))(tiny_model(PLAIN))


@pytest.mark.parametrize("most", [2**24, 1], ids=["together", "one by one"])
def test_cached_tokens_equal_the_whole_sequence(whole, most, monkeypatch):
    """One token at a time across the position from which keys are left out, and chunks that are
    read as a whole at the start of a text and gathered later.
    """
    monkeypatch.setattr(sparse_attention, "_MOST_GATHERED", {"cpu": most})
    monkeypatch.setattr(sparse_attention, "_MOST_PRODUCTS", {"cpu": most})
    monkeypatch.setattr(sparse_attention, "_FEWEST_KEYS", 5)
    monkeypatch.setattr(MLA, "absorbs", staticmethod(lambda config, n_queries: n_queries < 8))
    got = decoded(tiny_model(PLAIN), tokens(2, LENGTH), [8, 1, 1, 1, 1, 4, 16, 8])
    assert_close(got, whole, LOGITS, "logits")


def test_cache_without_order_is_noticed(whole, monkeypatch):
    """Reading the first keys instead of the chosen ones."""
    right = sparse_mla.select

    def first(scores_BTS, visible_BTS, count):
        return right(jnp.zeros_like(scores_BTS), visible_BTS, count)

    monkeypatch.setattr(sparse_mla, "select", first)
    got = decoded(tiny_model(PLAIN), tokens(2, LENGTH), [20, 4, 16])
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(got, whole, LOGITS)


@pytest.mark.parametrize("speculative", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_engine_continues_as_the_whole_sequence_does(speculative):
    """With an engine's pages of known prefixes, and with drafts of the MTP modules."""
    model, prompt, new = tiny_model(CONFIG if speculative else PLAIN), tuple(range(3, 40)), 12
    asked = Request(prompt, new, sampling=Sampling(temperature=0.0))
    engine = Engine(model, speculative=speculative, prefix_tokens=256, prefill_chunk=16)
    (first,) = engine.complete([asked])
    (again,) = engine.complete([asked])
    assert engine.statistics.cached_tokens > 0 and again.tokens == first.tokens
    row = jnp.asarray([*prompt, *first.tokens], jnp.int32)[None]
    best = np.asarray(jax.jit(lambda model: model(row))(model).argmax(axis=-1))[0]
    assert first.tokens == best[len(prompt) - 1 : -1].tolist()


def on_mesh(function, sizes):
    mesh = make_mesh(sizes, int(np.prod(list(sizes.values()))))
    model = jax.tree.map(jax.device_put, tiny_model(CONFIG), shardings(tiny_model(CONFIG), mesh))
    with jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, jax.jit(function)(model))


def learnt(model):
    """Logits and index losses of packed rows, and the gradient of both."""
    rows, segments = tokens(8, LENGTH), jnp.asarray(np.tile(SEGMENTS, (8, 1)))

    def total(model):
        inputs = read_tokens(rows, segments, isolate=True, n_mtp=1)
        found = model.forward(inputs, lesson="sparse")
        logits = restore(model.logits(found.main_BTD))
        return found.index_loss.sum() + 1e-3 * jnp.square(logits).mean(), (logits, found.index_loss)

    (_, outputs), gradient = jax.value_and_grad(total, has_aux=True, allow_int=True)(model)
    attn = gradient.moe_layers.attn
    indexer = attn.indexer.wq_b, attn.indexer.wk, attn.indexer.weights_proj
    return *outputs, *(part[...] for part in (*indexer, attn.wq_b, attn.wkv_a, attn.wkv_b, attn.wo))


@pytest.fixture(scope="module")
def alone():
    return on_mesh(learnt, {"data": 1})


@pytest.mark.heavy
@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "context": 2, "tensor": 2},
        {"expert": 4, "tensor": 2},
        *(
            pytest.param(sizes, marks=pytest.mark.slow)
            for sizes in (
                {"context": 4, "tensor": 2},
                {"fsdp": 4, "tensor": 2},
                {"fsdp": 2, "expert": 2, "context": 2},
                {"context": 4, "fsdp": 2},
            )
        ),
    ],
    ids=str,
)
def test_every_mesh_gathers_the_same(sizes, alone):
    for number, (got, want) in enumerate(zip(on_mesh(learnt, sizes), alone, strict=True)):
        assert_close(got, want, F32, f"output {number}")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "sizes",
    [
        {"context": 2, "expert": 2, "tensor": 2},
        pytest.param({"expert": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mesh_masks_the_same(sizes, alone, monkeypatch):
    assert filled(SparseMLA, CONFIG).gathers(LENGTH)
    monkeypatch.setattr(SparseMLA, "gathers", lambda *_: False)
    for number, (got, want) in enumerate(zip(on_mesh(learnt, sizes), alone, strict=True)):
        assert_close(got, want, F32, f"output {number}")


@pytest.mark.heavy
@pytest.mark.parametrize("sizes", [{"expert": 2, "tensor": 2, "data": 2}, {"fsdp": 4}], ids=str)
def test_every_mesh_generates_the_same(sizes):
    model, prompt = tiny_model(CONFIG), tuple(range(3, 30))
    mesh = make_mesh(sizes, int(np.prod(list(sizes.values()))))
    sharded = jax.tree.map(jax.device_put, model, shardings(model, mesh))
    want, got = (Engine(each).complete([Request(prompt, 9)])[0].tokens for each in (model, sharded))
    assert len(want) == 9 and got == want


@pytest.mark.parametrize("lesson", ["warmup", "sparse"])
def test_index_loss_trains_the_indexer_alone(lesson):
    """Its inputs are detached: nothing else has a gradient, and every part of it has one."""

    def total(model):
        inputs = read_tokens(tokens(2, LENGTH), None, isolate=False, n_mtp=1)
        return model.forward(inputs, lesson=lesson).index_loss.sum()

    gradient = jax.jit(jax.grad(total, allow_int=True))(tiny_model(CONFIG))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.asarray(leaf, np.float64).any() == ("indexer" in jax.tree_util.keystr(keys))


def test_attention_does_not_reach_the_indexer():
    total = jax.jit(jax.grad(lambda model: model(tokens(2, LENGTH)).sum(), allow_int=True))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(total(tiny_model(PLAIN))):
        if "indexer" in jax.tree_util.keystr(keys):
            assert not np.asarray(leaf).any()


def test_warm_up_runs_the_dense_model():
    model = tiny_model(PLAIN)

    @jax.jit
    def both(model, dense):
        inputs = read_tokens(tokens(2, LENGTH), None, isolate=False, n_mtp=0)
        return model.forward(inputs, lesson="warmup").main_BTD, dense.forward(inputs).main_BTD

    got, want = both(model, dense_twin(model))
    assert_close(got, want, F32, "hidden states")


def test_padding_does_not_count_in_the_index_loss():
    row, segments = tokens(1, LENGTH), np.ones((1, LENGTH), np.int32)
    segments[0, 30:] = 0

    @jax.jit
    def loss(model, tokens_BT, segments_BT):
        inputs = read_tokens(tokens_BT, segments_BT, isolate=True, n_mtp=0)
        return model.forward(inputs, lesson="sparse").index_loss

    got = loss(tiny_model(PLAIN), row, jnp.asarray(segments))
    want = loss(tiny_model(PLAIN), row[:, :30], jnp.ones((1, 30), jnp.int32))
    assert_close(got, want, F32, "index loss")


def test_gradients_do_not_depend_on_the_tiles(monkeypatch):
    def gradient(model):
        return jax.jit(jax.grad(lambda model: model(tokens(2, LENGTH)).var(), allow_int=True))(
            model
        )

    want = gradient(tiny_model(PLAIN)).dense_layers.attn.wkv_b[...]
    monkeypatch.setattr(sparse_attention, "_MOST", 2 * LENGTH * 16 * 5)
    monkeypatch.setattr(sparse_attention, "_MOST_GATHERED", {"cpu": 1})
    assert_close(gradient(tiny_model(PLAIN)).dense_layers.attn.wkv_b[...], want, F32, "gradient")


@pytest.mark.parametrize("remat", ["full", "selective"])
def test_backward_pass_does_not_choose_again(remat, monkeypatch):
    """What a query chose is kept, whatever else is recomputed."""
    monkeypatch.setattr(SparseMLA, "gathers", lambda *_: True)
    inputs = read_tokens(tokens(2, LENGTH), None, isolate=False, n_mtp=0)

    def total(model):
        found = model.forward(inputs, remat=remat, lesson="sparse")
        return found.main_BTD.sum() + found.index_loss.sum()

    traced = jax.make_jaxpr(jax.grad(total, allow_int=True))(tiny_model(PLAIN))
    assert _count(traced.jaxpr, "top_k") == 1


def _count(jaxpr, name):
    inside = (_count(inner, name) for e in jaxpr.eqns for inner in jaxprs_in_params(e.params))
    return sum(e.primitive.name == name for e in jaxpr.eqns) + sum(inside)


def test_flops_count_scores_of_all_keys_and_attention_to_the_chosen():
    config = dataclasses.replace(TINY, **INDEXED, index_topk=4)
    per_key = 2 * 4 * (12 + 8)
    scores = 2 * 16 * 13
    assert SparseMLA.context_flops(config, 10, causal=False) == 10 * scores + 4 * per_key
    # Of ten queries the first four see 1 to 4 keys, at half a key less on average; the rest see 4.
    assert SparseMLA.context_flops(config, 10, causal=True) == 5 * scores + (4 - 16 / 20) * per_key
    assert SparseMLA.context_flops(config, 4, causal=True) == 2 * scores + 2 * per_key

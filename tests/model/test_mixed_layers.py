"""The layers of DeepSeek-V4 as a whole: tokens added to a cache equal the whole sequence, packed
documents equal each alone, meshes equal one device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.generate.engine import Engine
from dsjax.generate.request import Request
from dsjax.generate.sampling import Sampling
from dsjax.model.cache import empty_cache
from dsjax.model.mixed_layers import HyperBlock, Spread, check_parts
from dsjax.model.parameters import shardings
from dsjax.parallel.mesh import make_mesh
from tests.closeness import EXACT, F32, assert_close
from tests.model.compressed import COMPRESSED, compressed_model, tokens

QUICK = {"xla_backend_optimization_level": 0}
# One program for two layers, where COMPRESSED has one for each of three kinds.
SPARSE = dataclasses.replace(
    COMPRESSED, n_layers=2, layer_types=("sparse", "sparse"), hash_layers=()
)
LENGTH = 27  # three heavy entries, six sparse ones of which three are chosen, and a rest
TOKENS = tokens(2, LENGTH)


@functools.cache
def forward():
    return jax.jit(lambda model, *given: model(*given), compiler_options=QUICK)


@functools.cache
def extended():
    def run(model, tokens_BT, starts_B, cache):
        found = model.extend(tokens_BT, starts_B, cache, routing=True)
        return model.logits(found.main_BTD), found.cache, found.experts_LBTK

    return jax.jit(run, compiler_options=QUICK)


def whole(config=COMPRESSED):
    return np.asarray(forward()(compressed_model(config), TOKENS))


@pytest.mark.parametrize(
    "config", [SPARSE, pytest.param(COMPRESSED, marks=pytest.mark.heavy)], ids=["sparse", "all"]
)
def test_tokens_added_to_a_cache_equal_the_whole_sequence(config):
    """In chunks of 6 that end in padding, so that entries and windows end at all places of one."""
    cache, found, start = empty_cache(config, 2, LENGTH + 6, jnp.float32), [], 0
    for count in (5, 6, 4, 1, 1, 5, 5):
        chunk = np.zeros((2, 6), np.int32)
        chunk[:, :count] = TOKENS[:, start : start + count]
        starts = np.full(2, start, np.int32)
        logits, cache, experts = extended()(compressed_model(config), chunk, starts, cache)
        found.append(logits[:, :count])
        start += count
    assert start == LENGTH
    assert_close(np.concatenate(found, axis=1), whole(config), F32)
    assert experts.shape == (config.n_layers, 2, 6, config.n_activated_experts)


@pytest.mark.heavy
def test_packed_documents_equal_each_alone():
    first = 11
    segments = np.array([[1] * first + [2] * (LENGTH - first)] * 2, np.int32)
    packed = np.asarray(forward()(compressed_model(), TOKENS, segments))
    assert_close(packed[:, :first], whole()[:, :first], F32)
    alone = np.pad(TOKENS[:, first:], ((0, 0), (0, first)))
    want = np.asarray(forward()(compressed_model(), alone))[:, : LENGTH - first]
    assert_close(packed[:, first:], want, F32)


def test_table_spreads_the_tokens_over_all_experts():
    table = np.asarray(Spread(4)(jax.random.key(0), (3, 2, 8), jnp.float32))
    assert table.shape == (3, 2, 8)
    assert (table[:, 0] != table[:, 1]).all()
    assert (np.bincount(table.astype(int).ravel()) == table.size // 4).all()


def test_experts_of_a_hashed_layer_are_those_of_the_table():
    model = compressed_model()
    block: HyperBlock = jax.tree.map(lambda leaf: leaf[0], model.moe_layers.window_hash)
    chosen = block.experts_of(jnp.asarray(TOKENS))
    table = np.asarray(block.tid2eid[...])
    assert chosen is not None
    assert_close(chosen, np.moveaxis(table[:, TOKENS], 0, -1).astype(np.int32), EXACT)
    assert not hasattr(block.ffn.gate, "bias")


def test_sequences_stay_whole():
    check_parts(COMPRESSED, 1)
    with pytest.raises(ValueError, match=r"mesh\.context=2 devices would share.*set mesh\.context"):
        check_parts(COMPRESSED, 2)
    model = compressed_model()
    with (
        jax.set_mesh(make_mesh({"context": 2}, n_devices=2)),
        pytest.raises(ValueError, match=r"compressed keeps sequences whole"),
    ):
        jax.eval_shape(lambda: model(tokens(2, 16)))


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "expert": 2},
        pytest.param({"tensor": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param({"tensor": 2, "fsdp": 2, "data": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.heavy
def test_meshes_score_and_generate_as_one_device(mesh):
    asked = [
        Request(tuple(row[:12].tolist()), 16, sampling=Sampling(temperature=0.0))
        for row in tokens(8, 12, seed=3)
    ]
    want = [output.tokens for output in Engine(compressed_model()).complete(asked)]
    here = make_mesh(mesh, n_devices=8)
    model = jax.device_put(compressed_model(), shardings(compressed_model(), here))
    rows = np.concatenate([TOKENS] * 4)
    with jax.set_mesh(here):
        got = np.asarray(jax.jit(lambda model, ids: model(ids))(model, rows))
        found = [output.tokens for output in Engine(model).complete(asked)]
    assert_close(got[:2], whole(), F32)
    assert found == want


@pytest.mark.heavy
def test_known_prefix_gives_the_same_tokens():
    engine = Engine(compressed_model(), prefill_chunk=16, prefix_tokens=128)
    prompt = tuple(tokens(1, 40, seed=5)[0].tolist())
    asked = [Request(prompt, 12, sampling=Sampling(temperature=0.0))]
    first = engine.complete(asked)[0].tokens
    again = engine.complete(asked)[0].tokens
    assert engine.statistics.cached_tokens == 32
    assert first == again

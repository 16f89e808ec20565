"""Layers as arrays of their own: the same model, in the same memory, without copies."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.model.cache import empty_cache
from dsjax.model.layers import stays_float32
from dsjax.model.parameters import shardings
from dsjax.model.separate_layers import SeparateLayers, separable
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.precision.small_weights import quantize
from tests.closeness import F32, assert_close
from tests.golden.ours import QUICK
from tests.model.tiny import TINY, tiny_model, tokens

# A latent so wide that a chunk expands it and a step absorbs its projection.
V3 = dataclasses.replace(TINY, n_mtp=0, kv_lora_rank=32)
# Two layers without experts compile fast.
PLAIN = dataclasses.replace(
    V3, n_layers=2, n_dense_layers=2, n_routed_experts=0, n_shared_experts=0, router_bias=False
)
GROUPED = dataclasses.replace(PLAIN, attention="gqa", n_kv_heads=2, head_dim=12, qkv_bias=True)
NATIVE = dataclasses.replace(
    PLAIN, attention="nsa", n_kv_heads=2, head_dim=8, v_head_dim=6,
    nsa_length=8, nsa_stride=4, nsa_block=8, nsa_count=4, nsa_window=6,
)  # fmt: skip
SPARSE = dataclasses.replace(PLAIN, index_n_heads=16, index_head_dim=12, index_topk=9)
KINDS = {"v3": V3, "grouped": GROUPED, "native": NATIVE, "sparse": SPARSE}
CASES = [("v3", 1), ("v3", 3), ("grouped", 1), ("grouped", 3), ("native", 3), ("sparse", 1)]


def continued(model: Transformer, rows, chunks=(12, 1)):
    """The hidden states and experts of a text that is run in chunks, and the cache."""

    def run(model, rows):
        cache = empty_cache(
            model.config, len(rows), rows.shape[1], model.policy.compute, separate=model.separate
        )
        start, states, chosen = 0, [], []
        for size in chunks:
            starts_B = jnp.full(len(rows), start, jnp.int32)
            part = rows[:, start : start + size]
            extended = model.extend(part, starts_B, cache, routing=model.config.n_moe_layers > 0)
            cache, start = extended.cache, start + size
            states.append(extended.main_BTD)
            chosen.append(extended.experts_LBTK)
        return jnp.concatenate(states, axis=1), chosen, cache

    return jax.jit(run, compiler_options=QUICK)(model, rows)


@pytest.mark.parametrize("kind, batch", CASES)
def test_separate_layers_are_the_same_model(kind, batch):
    stacked, rows = tiny_model(KINDS[kind]), tokens(batch, 13)
    separate = stacked.for_decoding()
    assert separate.separate and not stacked.separate
    (got, chosen, cache), (want, chosen_want, stack) = (
        continued(model, rows) for model in (separate, stacked)
    )
    assert_close(got, want, F32, kind)
    for own, other in zip(chosen, chosen_want, strict=True):
        np.testing.assert_array_equal(own, other)
    for layers, whole in ((cache.dense, stack.dense), (cache.moe, stack.moe)):
        assert isinstance(layers, tuple | None) and isinstance(whole, dict | None)
        joined = jax.tree.map(lambda *each: jnp.concatenate(each), *layers) if layers else None
        jax.tree.map(lambda own, other: assert_close(own, other, F32, "entries"), joined, whole)


def test_separate_layers_share_the_memory_of_the_stack():
    stack = jax.tree.map(jnp.copy, tiny_model(GROUPED).dense_layers)
    layers = SeparateLayers(stack).layers
    for number, layer in enumerate(layers):
        for own, whole in zip(jax.tree.leaves(layer), jax.tree.leaves(stack), strict=True):
            np.testing.assert_array_equal(own, whole[number])
        own, whole = layer.attn.wq[...], stack.attn.wq[...]
        before = number * own.nbytes
        assert own.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + before


def in_bfloat16(config: ModelConfig, compute=jnp.bfloat16) -> Transformer:
    """A model whose parameters are bfloat16."""

    def narrowed(variable):
        value = variable.get_value()
        return variable.copy(value if stays_float32(variable) else value.astype(jnp.bfloat16))

    model = tiny_model(config, compute=compute)
    return jax.tree.map(narrowed, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def test_narrow_floats_are_bits_in_the_memory_of_the_stack():
    stacked: Any = in_bfloat16(GROUPED)
    separate = stacked.for_decoding()
    for number, layer in enumerate(separate.dense_layers.layers):
        own, whole = layer.attn.wq[...], stacked.dense_layers.attn.wq[...]
        before = number * own.codes.nbytes
        assert own.codes.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + before
        np.testing.assert_array_equal(own.astype(jnp.bfloat16), whole[number])
        assert layer.attn_norm.weight[...].dtype == jnp.bfloat16
    for outer in ("embed", "head"):
        own, whole = (getattr(each, outer).weight[...] for each in (separate, stacked))
        assert own.codes.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["v3", "native"])
def test_separate_layers_of_bfloat16_are_the_same_model(kind, tied):
    # Activations that were rounded to bfloat16 too could choose other experts.
    stacked = in_bfloat16(dataclasses.replace(KINDS[kind], tie_embed=tied), jnp.float32)
    rows = tokens(2, 13)
    (got, *_), (want, *_) = (continued(each, rows) for each in (stacked.for_decoding(), stacked))
    assert_close(got, want, F32, kind)


def test_a_step_in_bfloat16_keeps_no_widened_copy_of_the_weights():
    config = ModelConfig(
        vocab_size=64, dim=512, n_layers=2, n_dense_layers=1, n_heads=4, n_kv_heads=4, head_dim=32,
        inter_dim=1024, attention="gqa", max_seq_len=64, n_routed_experts=16,
        n_activated_experts=1, moe_inter_dim=128, n_shared_experts=0,
    )  # fmt: skip
    model = in_bfloat16(config).for_decoding()

    def steps(model, cache):
        def step(carry, _):
            cache, position = carry
            extended = model.extend(jnp.zeros((1, 1), jnp.int32), position, cache)
            return (extended.cache, position + 1), None

        return jax.lax.scan(step, (cache, jnp.zeros(1, jnp.int32)), length=4)[0]

    cache = empty_cache(config, 1, 64, jnp.bfloat16, separate=True)
    analysis = jax.jit(steps, donate_argnums=1).lower(model, cache).compile().memory_analysis()
    assert analysis is not None
    experts, dense = 3 * 16 * 512 * 128, 3 * 512 * 1024  # numbers of either layer
    assert analysis.temp_size_in_bytes < 4 * min(experts, dense) / 2


def test_a_stack_is_donated_once_its_layers_are_gone():
    """While there are layers, a step that takes the stack's memory leaves them what they are."""
    stack = jax.tree.map(jnp.copy, tiny_model(GROUPED).dense_layers)
    kept = np.array(stack.attn.wq[...])
    double = jax.jit(lambda w: 2 * w, donate_argnums=0)
    layers = SeparateLayers(stack)
    jax.block_until_ready(double(stack.attn.wq[...]))
    np.testing.assert_array_equal(layers.layers[1].attn.wq[...], kept[1])
    del layers
    double(stack.attn.wo[...])
    assert stack.attn.wo[...].is_deleted()


def test_only_what_one_cpu_holds_in_whole_bytes_is_separated():
    mesh = make_mesh({"tensor": 2}, n_devices=2)
    stacked = tiny_model(GROUPED)
    split = jax.device_put(stacked, shardings(stacked, mesh))
    assert split.for_decoding() is split and separable(stacked)
    declared = Transformer(GROUPED, Policy(jnp.float32))
    assert declared.for_decoding() is declared
    for dtype, whole in ((ml_dtypes.int4, False), (np.int8, True)):
        assert separable(small(stacked, np.dtype(dtype))) == whole


def small(model: Transformer, dtype: np.dtype) -> Transformer:
    """The model with the outputs of its feed-forward layers in fewer bits."""

    def quantized(keys, variable):
        if keys[-1].name != "w_down":
            return variable
        each = [quantize(np.asarray(w), dtype, 16) for w in variable[...]]
        return variable.copy(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))

    return jax.tree_util.tree_map_with_path(
        quantized, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def test_small_weights_are_the_same_in_separate_layers():
    model, rows = small(tiny_model(GROUPED), np.dtype(np.int8)), tokens(2, 13)
    (got, *_), (want, *_) = (continued(each, rows) for each in (model.for_decoding(), model))
    assert_close(got, want, F32, "int8")
    plain, *_ = continued(tiny_model(GROUPED), rows)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(got, plain, F32, "not rounded")


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_copies_neither_matrices_nor_entries(batch):
    """Beside its arguments, whose caches it changes in place, a step needs less memory than one
    matrix or entry takes.
    """
    config = ModelConfig(
        vocab_size=64, dim=128, n_layers=2, n_dense_layers=2, n_heads=4, n_kv_heads=4, head_dim=32,
        inter_dim=512, attention="gqa", max_seq_len=512,
    )  # fmt: skip

    def temporary(model: Transformer) -> int:
        def steps(model, cache):
            def step(carry, _):
                cache, position = carry
                rows = jnp.zeros((batch, 1), jnp.int32)
                return (model.extend(rows, position, cache).cache, position + 1), None

            return jax.lax.scan(step, (cache, jnp.zeros(batch, jnp.int32)), length=4)[0]

        cache = empty_cache(config, batch, 512, jnp.float32, separate=model.separate)
        compiled = jax.jit(steps, donate_argnums=1).lower(model, cache).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    matrix, entry = 128 * 512 * 4, batch * 512 * 128 * 4
    stacked = tiny_model(config)
    assert temporary(stacked.for_decoding()) < min(matrix, entry) < temporary(stacked)

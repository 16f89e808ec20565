"""A dense layer's decoding step in a few kernels, interpreted, against what any machine runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import few_rows, latent_attention, latent_queries
from dsjax.kernels.target import HOPPER, Target
from dsjax.model.block import Block, Extension
from dsjax.model.cache import empty_cache
from dsjax.model.layer_cache import LayerCache
from dsjax.model.layers import FeedForward, stack
from dsjax.model.mla import MLA
from dsjax.model.parameters import initialize
from dsjax.model.rope import angles
from dsjax.precision.policy import Policy
from tests.closeness import BF16, F32, assert_close
from tests.golden.ours import QUICK
from tests.model.tiny import TINY

CONFIG = dataclasses.replace(
    TINY, dim=64, n_layers=2, n_dense_layers=2, n_routed_experts=0, n_shared_experts=0,
    router_bias=False, n_heads=16, q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=32, inter_dim=64,
)  # fmt: skip
B, S, LAYER = 3, 64, 1
POSITIONS_B1 = np.asarray([[40], [0], [63]], np.int32)


@pytest.fixture
def interpreted(monkeypatch):
    for module, name in [
        (few_rows, "few_row_products"),
        (few_rows, "few_row_swiglu"),
        (latent_queries, "latent_queries"),
        (latent_queries, "head_values"),
        (latent_attention, "latent_attention"),
    ]:
        kernel = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, kernel)


def declared(config, policy):
    return stack(Block(config, policy, moe=False), 2)


def layers(config, dtype, target):
    """Two layers whose norms are not ones."""
    model = initialize(declared(config, Policy(dtype, target)), jax.random.key(0))
    assert isinstance(model.attn, MLA)
    rng = np.random.default_rng(0)
    own = model.attn.kv_norm, getattr(model.attn, "q_norm", None)
    for norm in (model.attn_norm, *own, model.ffn_norm):
        if norm is not None:
            norm.weight.set_value(jnp.asarray(rng.uniform(0.5, 1.5, norm.weight.shape)))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model)


def widened(model):
    """The same weights in a model that computes in float32 on a CPU."""
    structure = jax.tree.structure(declared(model.attn.config, Policy(jnp.float32, Target("cpu"))))
    return jax.tree.unflatten(
        structure, [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(model)]
    )


def inputs(config, dtype):
    rng = np.random.default_rng(1)
    entries = empty_cache(config, B, S, dtype).dense
    entries = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), entries)
    # A residual as small as what layers add to it, or that would not be seen.
    return jnp.asarray(0.1 * rng.normal(size=(B, 1, config.dim)), dtype), entries


@functools.partial(jax.jit, compiler_options=QUICK)
def extended(model, x_BTD, entries):
    positions = jnp.asarray(POSITIONS_B1)
    extension = Extension(positions, angles(positions, model.attn.config))
    cache = LayerCache(entries, jnp.int32(LAYER))
    own = jax.tree.map(lambda leaf: leaf[LAYER], model)
    x_BTD, cache, _ = own.extend(x_BTD, cache, extension, model)
    return x_BTD, cache.entries


@pytest.mark.parametrize("q_lora_rank", [64, 0])
@pytest.mark.parametrize(("dtype", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_step_equals_what_any_machine_runs(q_lora_rank, dtype, level, interpreted, monkeypatch):
    config = dataclasses.replace(CONFIG, q_lora_rank=q_lora_rank)
    model, given = layers(config, dtype, HOPPER), inputs(config, dtype)
    assert model.attn.steps(given[0], LayerCache(given[1], jnp.int32(0))) == (dtype == jnp.bfloat16)
    assert model.ffn.steps(given[0]) == (dtype == jnp.bfloat16)
    # Float32 is not for a GPU, but shows more digits.
    for half in (MLA, FeedForward):
        monkeypatch.setattr(half, "steps", lambda *given: True)
    got = extended(model, *given)
    monkeypatch.undo()
    want = extended(widened(model), *jax.tree.map(lambda x: x.astype(jnp.float32), given))
    assert_close(got[0], want[0], level, "residual")
    for name, entry in got[1].items():
        assert_close(entry, want[1][name], level, name)
        assert not np.array_equal(entry[LAYER], given[1][name][LAYER])


@pytest.mark.parametrize(
    "why, config, tokens, target",
    [
        ("another GPU", CONFIG, 1, Target("gpu", (8, 0))),
        ("two tokens", CONFIG, 2, HOPPER),
        ("an index", dataclasses.replace(CONFIG, index_n_heads=16, index_head_dim=16, index_topk=9),
         1, HOPPER),
        ("a width", dataclasses.replace(CONFIG, q_lora_rank=72), 1, HOPPER),
    ],
)  # fmt: skip
def test_other_steps_are_as_before(why, config, tokens, target):
    model, (x_B1D, entries) = layers(config, jnp.bfloat16, target), inputs(config, jnp.bfloat16)
    x_BTD = jnp.repeat(x_B1D, tokens, axis=1)
    assert not model.attn.steps(x_BTD, LayerCache(entries, jnp.int32(0))), why

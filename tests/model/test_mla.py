import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model import rope
from dsjax.model.mla import MLA
from dsjax.model.parameters import declarations, initialize
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import constrain
from dsjax.precision.policy import Policy
from tests.closeness import BF16, F32, assert_close
from tests.golden.compare import float64
from tests.model.tiny import TINY
from tests.oracles.attention import mla as oracle_mla

apply = jax.jit(MLA.__call__)


def _module(config, compute=jnp.float32):
    module = initialize(MLA(config, Policy(compute)), jax.random.key(0))
    # Norm weights away from one, so that leaving one out shows.
    scale = jnp.linspace(0.5, 1.5, config.kv_lora_rank)
    module.kv_norm.weight.set_value(scale)
    return module


def _tree(module):
    tree: dict = {}
    for declared, value in zip(declarations(module), jax.tree.leaves(module), strict=True):
        *parents, name = declared.path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = np.asarray(value)
    return float64(tree)


@pytest.mark.parametrize("q_lora_rank", [0, 16])
@pytest.mark.parametrize(("compute", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_mla_equals_oracle(q_lora_rank, compute, level):
    config = dataclasses.replace(TINY, q_lora_rank=q_lora_rank)
    module = _module(config, compute)
    x = np.random.default_rng(0).normal(size=(40, config.dim))
    angles = rope.angles(jnp.arange(40, dtype=jnp.int32)[None], config)
    got = apply(module, jnp.asarray(x, compute)[None], angles)[0]
    want = oracle_mla(
        np.asarray(jnp.asarray(x, compute), np.float64), _tree(module), config, np.ones(40)
    )
    assert_close(got, want, level, "attention")


def test_entries_are_the_normed_latent_and_one_rotated_key():
    module = _module(TINY)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, TINY.dim)), jnp.float32)
    angles = rope.angles(jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9)), TINY)
    entries = module.entries(x, angles)
    assert {name: shape.width for name, shape in MLA.cached(TINY).items()} == {
        name: entry.shape[-1] for name, entry in entries.items()
    }
    raw = x @ module.wkv_a[...]
    assert_close(entries["latent"], module.kv_norm(raw[..., : TINY.kv_lora_rank]), F32, "latent")
    assert_close(entries["rope_key"][:, 0], raw[:, 0, TINY.kv_lora_rank :], F32, "first key")


def test_expanded_keys_end_with_the_shared_rope_key():
    module, shared = _module(TINY), -jnp.ones((2, 3, TINY.qk_rope_head_dim))
    latent = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    keys, values = module.expand(latent, shared, module.expansion())
    up = (latent @ module.wkv_b[...]).reshape(2, 3, TINY.n_heads, -1)
    assert (np.asarray(keys[..., 8:]) == -1).all() and keys.shape[-1] == TINY.qk_head_dim
    assert_close(keys[..., :8], up[..., :8], F32, "keys")
    assert_close(values, up[..., 8:], F32, "values")


def test_absorbed_is_for_few_queries():
    """V3 breaks even at 512 x (128 + 128) / (512 + 64 + 512 - 128 - 64 - 128) = 170.7 queries."""
    v3 = dataclasses.replace(
        TINY, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    assert [MLA.absorbs(v3, n) for n in (1, 170, 171, 512)] == [True, True, False, False]


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert": 4, "tensor": 2},
        *(
            pytest.param(sizes, marks=pytest.mark.slow)
            for sizes in (
                {"context": 4, "tensor": 2},
                {"fsdp": 4, "tensor": 2},
                {"expert": 2, "tensor": 4},
                {"fsdp": 2, "expert": 2, "tensor": 2},
                {"fsdp": 2, "context": 2, "tensor": 2},
                {"fsdp": 2, "expert": 2, "context": 2},
            )
        ),
    ],
    ids=str,
)
def test_absorbed_projections_have_their_gradients_where_devices_hold_parts_of_heads(sizes):
    """TINY has four heads, and the eight devices hold half of one each."""
    module, generator = _module(TINY), np.random.default_rng(0)
    heads = TINY.n_heads, TINY.qk_nope_head_dim, TINY.kv_lora_rank
    w, q, out = (
        jnp.asarray(generator.normal(size=shape), jnp.float32)
        for shape in (module.wkv_b.shape, (8, 8, *heads[:2]), (8, 8, *heads[::2]))
    )

    @jax.jit
    def gradients(w, q, out):
        axes = "batch", "length", "heads", "width"

        def total(w, q, out):
            w = constrain(w, "latent", "latent_heads")
            results = module.absorbed(constrain(q, *axes), w), module.projected(out, w)
            return sum(jnp.square(constrain(result, *axes)).mean() for result in results)

        return jax.grad(total, argnums=(0, 1, 2))(w, q, out)

    want = gradients(w, q, out)
    with jax.set_mesh(make_mesh(sizes)):
        got = gradients(w, q, out)
    for number, parts in enumerate(zip(got, want, strict=True)):
        assert_close(*parts, F32, f"gradient {number}")

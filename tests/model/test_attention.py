"""What attention classes say of themselves, against what they declare and cache."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from dsjax.model.block import attention_class
from dsjax.model.gqa import GQA
from dsjax.model.mla import MLA
from dsjax.model.parameters import declarations
from dsjax.precision.policy import Policy
from tests.model.tiny import TINY

GROUPED = dataclasses.replace(TINY, attention="gqa", n_kv_heads=2, head_dim=8, qkv_bias=True)
CONFIGS = {
    "mla": (TINY, MLA),
    "mla without a query latent": (dataclasses.replace(TINY, q_lora_rank=0), MLA),
    "gqa": (GROUPED, GQA),
}


@pytest.fixture(params=CONFIGS)
def named(request):
    return CONFIGS[request.param]


def test_config_names_the_class(named):
    config, kind = named
    assert attention_class(config) is kind


def test_matmul_parameters_are_the_declared_matrices(named):
    config, kind = named
    declared = declarations(kind(config, Policy(jnp.float32)))
    matrices = [math.prod(d.shape) for d in declared if len(d.shape) == 2]
    assert kind.matmul_parameters(config) == sum(matrices)


def test_context_flops_are_those_of_the_two_products(named):
    """As XLA counts scores and their product with values, for one token of 7."""
    config, kind = named
    N, H, W = config.n_heads, config.qk_head_dim, config.value_head_dim

    def products(q_NH, k_SNH, v_SNW):
        return jnp.einsum("NS,SNW->NW", jnp.einsum("NH,SNH->NS", q_NH, k_SNH), v_SNW)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, H), (7, N, H), (7, N, W))]
    counted = jax.jit(products).lower(*shapes).cost_analysis()["flops"]
    assert kind.context_flops(config, 7, causal=False) == counted
    assert kind.context_flops(config, 7, causal=True) == counted // 2


def test_latents_are_what_selective_rematerialisation_names(named):
    config, kind = named
    module, width = kind(config, Policy(jnp.float32)), config.rope_dim // 2

    def attend(module, x_BTD):
        return module(x_BTD, (jnp.ones((1, 4, width)), jnp.zeros((1, 4, width)))).sum()

    x_BTD = jax.ShapeDtypeStruct((1, 4, config.dim), jnp.float32)
    named_latent = [
        equation.outvars[0].aval.size
        for equation in jax.make_jaxpr(attend)(module, x_BTD).eqns
        if equation.primitive.name == "name" and equation.params["name"] == "latent"
    ]
    assert 4 * kind.latent_values(config) == sum(named_latent)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model import rope
from dsjax.model.gqa import GQA
from dsjax.model.parameters import initialize
from dsjax.precision.policy import Policy
from tests.closeness import F32, assert_close
from tests.model.test_mla import _tree
from tests.model.tiny import TINY
from tests.oracles.attention import gqa as oracle_gqa


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_gqa_equals_oracle(kv_heads, bias):
    config = dataclasses.replace(
        TINY, attention="gqa", n_kv_heads=kv_heads, head_dim=12, qkv_bias=bias
    )
    module = initialize(GQA(config, Policy(jnp.float32)), jax.random.key(0))
    rng = np.random.default_rng(0)
    if bias:
        for variable in (module.bq, module.bk, module.bv):
            variable.set_value(
                jnp.asarray(rng.normal(size=variable.get_value().shape), jnp.float32)
            )
    x = rng.normal(size=(40, config.dim))
    angles = rope.angles(jnp.arange(40, dtype=jnp.int32)[None], config)
    got = module(jnp.asarray(x, jnp.float32)[None], angles)[0]
    assert_close(got, oracle_gqa(x, _tree(module), config, np.ones(40)), F32, "attention")

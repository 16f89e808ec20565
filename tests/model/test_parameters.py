import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.layers import RouterState
from dsjax.model.parameters import declarations, initialize, shardings
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from tests.closeness import EXACT, assert_close
from tests.model.tiny import TINY, tiny_model


def _by_path(model):
    return dict(zip((d.path for d in declarations(model)), jax.tree.leaves(model), strict=True))


def test_initial_values_depend_on_key_and_path_alone():
    model, more = tiny_model(), tiny_model(dataclasses.replace(TINY, n_mtp=0))
    for path, value in _by_path(more).items():
        assert_close(_by_path(model)[path], value, EXACT, path)
    assert not np.array_equal(tiny_model(seed=1).embed.weight[...], model.embed.weight[...])
    leaves = _by_path(model)
    assert not np.array_equal(leaves["dense_layers.ffn.w_gate"], leaves["dense_layers.ffn.w_up"])


def test_initial_weights_have_the_configured_spread():
    weight = np.asarray(tiny_model(dataclasses.replace(TINY, vocab_size=4096)).embed.weight[...])
    assert abs(weight.std() / TINY.init_std - 1) < 0.01 and abs(weight.mean()) < 0.001


def test_initialize_is_the_same_under_jit_and_split_over_devices():
    declared = Transformer(TINY, Policy(jnp.float32))
    placement = shardings(declared, make_mesh({"fsdp": 4, "tensor": 2}))
    split = jax.jit(lambda key: initialize(declared, key), out_shardings=placement)(
        jax.random.key(0)
    )
    for path, value in _by_path(tiny_model()).items():
        np.testing.assert_allclose(_by_path(split)[path], value, rtol=1e-6, err_msg=path)
    weight = split.moe_layers.ffn.experts.w_up[...]
    assert weight.sharding.shard_shape(weight.shape) == (2, 8, 32 // 4, 16 // 2)


def test_router_bias_is_declared_apart_from_the_parameters():
    kinds = {d.path: d.kind for d in declarations(tiny_model())}
    biases = {path for path, kind in kinds.items() if kind is RouterState}
    assert biases == {"moe_layers.ffn.gate.bias", "mtp.layer.ffn.gate.bias"}


def test_shardings_list_every_parameter_that_does_not_divide():
    odd = Transformer(dataclasses.replace(TINY, inter_dim=47, vocab_size=95), Policy(jnp.float32))
    with pytest.raises(ValueError) as error:
        shardings(odd, make_mesh({"data": 4, "tensor": 2}))
    for path in (
        "embed.weight",
        "head.weight",
        "dense_layers.ffn.w_gate",
        "dense_layers.ffn.w_down",
    ):
        assert f"{path}: dimension" in str(error.value)
    assert "mesh.tensor=2" in str(error.value)

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.layers import Embedding, FeedForward, RouterState
from dsjax.model.moe import MoE
from dsjax.model.parameters import declarations, initialize, pinned, shardings
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.precision.small_weights import quantize
from tests.closeness import EXACT, F32, assert_close
from tests.model.tiny import TINY

POLICY = Policy(jnp.float32)


def _by_path(model):
    return dict(zip((d.path for d in declarations(model)), jax.tree.leaves(model), strict=True))


def _moe(seed=0, config=TINY):
    return initialize(MoE(config, POLICY), jax.random.key(seed))


def test_initial_values_depend_on_key_and_path_alone():
    want = _by_path(_moe())
    fewer = _by_path(_moe(config=dataclasses.replace(TINY, n_shared_experts=0)))
    for path, value in fewer.items():
        assert_close(value, want[path], EXACT, path)
    assert not np.array_equal(want["experts.w_gate"], want["experts.w_up"])
    assert not np.array_equal(want["experts.w_gate"], _by_path(_moe(seed=1))["experts.w_gate"])


def test_initial_weights_have_the_configured_spread():
    weight = initialize(Embedding(4096, 32, TINY.init_std, POLICY), jax.random.key(0)).weight[...]
    assert abs(np.std(weight) / TINY.init_std - 1) < 0.01 and abs(np.mean(weight)) < 0.001


def test_initialize_is_the_same_split_over_devices():
    declared = MoE(TINY, POLICY)
    placement = shardings(declared, make_mesh({"fsdp": 4, "tensor": 2}))
    make = jax.jit(lambda key: initialize(declared, key), out_shardings=placement)
    split = make(jax.random.key(0))
    for path, value in _by_path(_moe()).items():
        np.testing.assert_allclose(_by_path(split)[path], value, rtol=1e-6, err_msg=path)
    weight = split.experts.w_up[...]
    assert weight.sharding.shard_shape(weight.shape) == (8, 32 // 4, 16 // 2)


def test_weights_travel_in_the_compute_type_and_the_router_in_float32():
    """Where fsdp and expert both split a dimension; all of this layer's values are kept."""
    layer, half = _moe(), Policy(jnp.bfloat16)
    with jax.set_mesh(make_mesh({"fsdp": 2, "expert": 4})):
        used = _by_path(jax.jit(lambda layer: pinned(layer, half))(layer))
    for path, value in _by_path(layer).items():
        rounded = "shared" in path
        want = value.astype(jnp.bfloat16).astype(jnp.float32) if rounded else value
        assert not rounded or not np.array_equal(value, want)
        np.testing.assert_array_equal(used[path], want, err_msg=path)


@pytest.mark.parametrize(
    ("sizes", "scales"),
    [({"expert": 8}, (2, 16)), ({"fsdp": 2, "expert": 4}, (2, 16)), ({"fsdp": 2}, (1, 16))],
    ids=str,
)
def test_a_small_weight_may_have_fewer_blocks_than_devices(sizes, scales):
    """Its numbers are split like any weight's; its scales too, where they divide."""
    wide = initialize(FeedForward(32, 16, 0.5, POLICY), jax.random.key(0))
    layer = jax.tree.map(lambda w: quantize(np.asarray(w), np.dtype(np.int8), 16), wide)
    x = jax.random.normal(jax.random.key(1), (8, 32))
    n_devices = math.prod(sizes.values())
    with jax.set_mesh(make_mesh(sizes, n_devices=n_devices)):
        up = jax.jit(lambda layer: pinned(layer, POLICY))(layer).w_up.get_value()
        got = jax.jit(lambda layer, x: pinned(layer, POLICY)(x))(layer, x)
    assert up.scales.sharding.shard_shape(up.scales.shape) == scales
    parts = sizes.get("fsdp", n_devices)  # where two axes split the numbers, one is gathered
    assert up.values.sharding.shard_shape(up.shape) == (32 // parts, 16)
    assert_close(got, layer(x), F32)


def test_router_bias_is_declared_apart_from_the_parameters():
    kinds = {d.path: d.kind for d in declarations(Transformer(TINY, POLICY))}
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

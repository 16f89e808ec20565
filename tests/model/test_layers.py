import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.model.layers import (
    Constant,
    Embedding,
    FeedForward,
    Normal,
    RMSNorm,
    RouterState,
    declare,
    rms_norm,
    rms_norm_of_kept_input,
    stack,
)
from dsjax.model.parameters import declarations, initialize
from dsjax.precision.policy import Policy
from tests.closeness import BF16, EXACT, F32, assert_close
from tests.oracles.attention import rms_norm as oracle_rms_norm
from tests.oracles.experts import ffn as oracle_ffn


def test_declaration_holds_no_memory_and_keeps_its_kind():
    variable = declare((1 << 40, 4), ("vocab", "embed"), Normal(0.1), RouterState)
    assert isinstance(variable, RouterState)
    assert isinstance(variable.get_value(), jax.ShapeDtypeStruct)


def test_stack_adds_a_layer_dimension_to_every_parameter():
    one = {d.path: d for d in declarations(FeedForward(4, 6, 0.1, Policy(jnp.float32)))}
    many = {d.path: d for d in declarations(stack(FeedForward(4, 6, 0.1, Policy(jnp.float32)), 3))}
    for path, declared in one.items():
        assert many[path].shape == (3, *declared.shape)
        assert many[path].axes == ("layers", *declared.axes)


@pytest.mark.parametrize(("dtype", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_rms_norm_equals_oracle(dtype, level):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 64)) * 1e-3, dtype)  # small, so that eps matters
    weight = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    got = rms_norm(x, jnp.asarray(weight), 1e-6)
    assert got.dtype == dtype
    assert_close(got, oracle_rms_norm(np.asarray(x, np.float64), weight, 1e-6), level, "norm")


def test_rms_norm_multiplies_by_bfloat16_weights_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)
    weight = jnp.asarray(rng.uniform(0.5, 1.5, 64), jnp.bfloat16)
    got, want = rms_norm(x, weight, 1e-6), rms_norm(x, weight.astype(jnp.float32), 1e-6)
    assert_close(got, want, EXACT, "norm")


def test_rms_norm_of_kept_input_keeps_it_alone_and_has_the_gradients_of_its_definition():
    def definition(x, weight):
        x32 = x.astype(jnp.float32)
        root = jnp.sqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + 1e-6)
        return (x32 / root * weight[None, None]).astype(x.dtype)

    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(2, 5, 64)) * 1e-3, jnp.bfloat16) for _ in range(2))
    weight = jnp.asarray(rng.uniform(0.5, 1.5, 64), jnp.float32)
    _, backward = jax.vjp(lambda x, weight: rms_norm_of_kept_input(x, weight, 1e-6), x, weight)
    kept = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(backward))
    assert kept == [((2, 5, 64), "bfloat16"), ((64,), "float32")]
    wide = jax.vjp(definition, x.astype(jnp.float32), weight)[1](dy.astype(jnp.float32))
    for name, got, want in zip(("x", "weight"), backward(dy), wide, strict=True):
        assert_close(got, want, BF16, name)


def test_feed_forward_equals_oracle():
    layer = initialize(FeedForward(16, 24, 0.3, Policy(jnp.float32)), jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 16))
    weights = (np.asarray(w[...], np.float64) for w in (layer.w_gate, layer.w_up, layer.w_down))
    assert_close(layer(jnp.asarray(x, jnp.float32)), oracle_ffn(x, *weights), F32, "feed-forward")


def test_token_outside_the_vocabulary_gives_nan_not_another_row():
    embedding = initialize(Embedding(4, 3, 0.1, Policy(jnp.float32)), jax.random.key(0))
    out = embedding(jnp.asarray([[3, 4]], jnp.int32))
    assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1]).all()


def test_norm_starts_at_one_and_constant_is_constant():
    norm = initialize(RMSNorm(4, 1e-6), jax.random.key(0))
    np.testing.assert_array_equal(norm.weight[...], np.ones(4))
    np.testing.assert_array_equal(Constant(2.0)(jax.random.key(0), (2,), jnp.float32), [2, 2])
    assert isinstance(norm.weight, nnx.Param)

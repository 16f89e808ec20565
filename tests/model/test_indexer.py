import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.shapes import V3_2
from dsjax.kernels.sparse_attention import Index, index_scores
from dsjax.model import rope
from dsjax.model.indexer import Indexer
from dsjax.model.sparse_mla import SparseMLA
from tests.closeness import BF16, F32, assert_close
from tests.model.test_mla import _tree as tree_of
from tests.model.tiny import TINY, filled
from tests.oracles.attention import index_scores as oracle

LENGTH = 40
CONFIG = dataclasses.replace(TINY, index_n_heads=16, index_head_dim=12, index_topk=9)


def inputs(compute=jnp.float32):
    x_TD = np.random.default_rng(0).normal(size=(LENGTH, CONFIG.dim))
    return jnp.asarray(x_TD, compute)


@jax.jit
def scores(module, x_TD):
    angles = rope.angles(jnp.arange(LENGTH, dtype=jnp.int32)[None], CONFIG)
    indexer, x_BTD = module.indexer, x_TD[None]
    queries = indexer.queries(module.query_latent(x_BTD), angles)
    return index_scores(Index(queries, indexer.weights(x_BTD), indexer.keys(x_BTD, angles)))[0]


def wanted(module, x_TD):
    return oracle(np.asarray(x_TD, np.float64), tree_of(module), CONFIG, np.arange(LENGTH))


@pytest.mark.parametrize(("compute", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_scores_equal_oracle(compute, level):
    module, x_TD = filled(SparseMLA, CONFIG, compute), inputs(compute)
    want = wanted(module, x_TD)
    assert (want < 0).mean() > 0.2  # weights have either sign
    got = scores(module, x_TD)
    assert got.dtype == jnp.float32
    assert_close(got, want, level, "scores")


def test_rotation_as_mla_turns_its_channels_is_noticed(monkeypatch):
    module, x_TD = filled(SparseMLA, CONFIG), inputs()
    monkeypatch.setattr(rope, "rotate_halves", rope.rotate_pairs)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(jax.jit(lambda *a: scores.__wrapped__(*a))(module, x_TD), wanted(module, x_TD))


def test_another_epsilon_of_the_norm_is_noticed():
    module, x_TD = filled(SparseMLA, CONFIG), inputs()
    want = wanted(module, x_TD)
    module.indexer.k_norm.eps = 1e-2
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(scores(module, x_TD), want)


def test_bias_of_the_norm_counts():
    module, x_TD = filled(SparseMLA, CONFIG), inputs()
    want = wanted(module, x_TD)
    module.indexer.k_norm.bias.set_value(jnp.zeros(CONFIG.index_head_dim))
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(scores(module, x_TD), want)


def test_head_weights_are_float32_whatever_computes():
    weights = Indexer(CONFIG, filled(SparseMLA, CONFIG, jnp.bfloat16).policy).weights_proj
    assert weights.get_value().dtype == jnp.float32
    module, x_TD = filled(SparseMLA, CONFIG, jnp.bfloat16), inputs(jnp.bfloat16)
    got = jax.jit(lambda module, x: module.indexer.weights(x))(module, x_TD[None])[0]
    matrix = np.asarray(module.indexer.weights_proj[...], np.float64)
    want = np.asarray(x_TD, np.float64) @ matrix / np.sqrt(16 * 12)
    assert_close(got, want, F32, "weights")


def test_parameters_of_v3_2_are_the_published_ones():
    """12,582,912 + 917,504 + 458,752 in matrices, and 256 in the norm."""
    assert Indexer.matmul_parameters(V3_2) == 13_959_168
    leaves = jax.tree.leaves(Indexer(V3_2, filled(SparseMLA, CONFIG).policy))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == 13_959_424
    assert Indexer.score_flops(V3_2) == 16_512

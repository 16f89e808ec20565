"""The model computes what the published models compute.

Against outputs of Hugging Face transformers (`tests/golden`), and against the float64 oracles for
what transformers does not have: DeepSeekMoE, multi-token prediction, balance losses, the bias
update. That these tests can fail is shown by `test_mutations.py`; the same comparisons run live
against transformers in `tests/reference`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model import balance
from dsjax.model.layers import RouterState
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from tests.closeness import F32, assert_close
from tests.golden import checkpoint, compare
from tests.golden.cases import CASES, LENGTH, ORACLE_CASES, STORED
from tests.oracles import losses, transformer


@pytest.mark.parametrize("name", CASES)
def test_model_equals_transformers(name):
    compare.against_golden(name)


@pytest.mark.parametrize("name", ["v3", "v32", "v2", "llama"])
def test_oracle_equals_transformers(name):
    """The oracles are trusted below for what transformers lacks, so they too are held to it."""
    config, tree = checkpoint.parameters(CASES[name])
    tokens_T = checkpoint.tokens(CASES[name], LENGTH)
    forward = transformer.forward(tokens_T, compare.float64(tree), config)
    assert_close(forward.logits_TV[STORED], compare.golden(name)["logits"], F32, "logits")


@pytest.mark.parametrize("isolated", [False, True])
def test_deepseek_moe_equals_oracle(isolated):
    compare.against_oracle("deepseek_moe", isolated)


@pytest.mark.parametrize("after_norm", [True, False])
@pytest.mark.parametrize("isolated", [False, True])
def test_mtp_equals_oracle(isolated, after_norm):
    change = {"mtp_after_final_norm": after_norm}
    compare.against_oracle("v3_mtp", isolated, after_norm, change=change)


@pytest.mark.parametrize("isolated", [False, True])
def test_sparse_attention_equals_oracle(isolated):
    """Three documents, of which two are longer than the number of keys; a module with an indexer
    of its own."""
    compare.against_oracle("v32_mtp", isolated)


@pytest.mark.parametrize("isolated", [False, True])
def test_training_losses_equal_oracle(isolated):
    compare.against_loss_oracle(isolated)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", compare.BALANCE_LOSSES)
def test_balance_loss_equals_oracle(name, isolated):
    compare.against_balance_oracle(name, isolated)


def test_bias_update_equals_oracle():
    compare.against_bias_oracle()


def test_bias_update_leaves_an_even_load_alone():
    bias_LE = jnp.asarray(checkpoint.uniform(0, "bias", (2, 8), -2, 7))
    np.testing.assert_array_equal(balance.update_bias(bias_LE, jnp.full((2, 8), 5), 0.001), bias_LE)


def test_max_violation_equals_oracle():
    counts_LE = np.floor(checkpoint.uniform(1, "counts", (3, 16), 0, 90)).astype(np.int32)
    want = [losses.max_violation(counts) for counts in counts_LE]
    assert_close(
        balance.max_violation(jnp.asarray(counts_LE)), np.array(want), F32, "max violation"
    )


def test_crowded_experts_drop_nothing():
    compare.against_crowded_oracle()


def test_router_normalises_tiny_scores():
    compare.against_tiny_scores()


def test_router_bias_is_float32_whatever_computes():
    config, _ = checkpoint.parameters(ORACLE_CASES["v3_mtp"])
    leaves = jax.tree.leaves(
        Transformer(config, Policy(jnp.bfloat16)),
        is_leaf=lambda leaf: isinstance(leaf, RouterState),
    )
    biases = [leaf.get_value() for leaf in leaves if isinstance(leaf, RouterState)]
    assert [bias.shape for bias in biases] == [(1, 32), (2, 32)]
    assert {bias.dtype for bias in biases} == {jnp.dtype(jnp.float32)}

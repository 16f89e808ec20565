"""Properties of the whole model; its numbers against transformers and the oracles are in test_equivalence."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.parameters import declarations
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from tests.closeness import BF16, F32, assert_close
from tests.model.tiny import TINY, tiny_model, tokens


def test_logits_do_not_see_the_future():
    model, row = tiny_model(), tokens(1, 40)
    changed = row.at[0, 25].set((row[0, 25] + 1) % TINY.vocab_size)
    got, want = model(changed), model(row)
    np.testing.assert_array_equal(got[:, :25], want[:, :25])
    assert np.abs(got[:, 25:] - want[:, 25:]).max(axis=-1).min() > 0


def test_packed_documents_equal_documents_alone():
    model = tiny_model()
    parts = [tokens(1, length, seed) for seed, length in enumerate((13, 20, 7))]
    row = jnp.concatenate(parts, axis=1)
    segments = jnp.repeat(jnp.asarray([[1, 2, 3]], jnp.int32), np.array([13, 20, 7]), axis=1)
    packed = model(row, segments)
    alone = jnp.concatenate([model(part) for part in parts], axis=1)
    assert_close(packed, alone, F32, "logits")
    assert np.abs(model(row)[:, 13:] - alone[:, 13:]).max() > 1e-3  # without isolation they differ


def test_batch_rows_do_not_meet():
    model, rows = tiny_model(), tokens(3, 24)
    assert_close(model(rows)[1:2], model(rows[1:2]), F32, "logits")


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_rematerialised_gradients_are_the_same_bits(remat):
    model, row = tiny_model(), tokens(2, 24)

    def loss(model, remat):
        hidden = model.hidden(row, remat=remat)
        return jnp.square(hidden.main_BTD).sum() + jnp.square(hidden.mtp_DBTD).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    chex.assert_trees_all_close(
        gradient(model, remat), gradient(model, "none"), rtol=1e-5, atol=1e-6
    )


def test_second_call_does_not_trace_again():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(model, row):
        return model(row)

    forward(tiny_model(seed=0), tokens(2, 16))
    forward(tiny_model(seed=1), tokens(2, 16, seed=1))


def test_program_size_does_not_grow_with_depth():
    def size(n_layers):
        model = Transformer(dataclasses.replace(TINY, n_layers=n_layers), Policy(jnp.float32))
        row = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        return len(jax.jit(lambda model, row: model(row)).lower(model, row).as_text())

    assert size(12) < 1.02 * size(3)


def test_tied_head_is_the_embedding():
    model = tiny_model(dataclasses.replace(TINY, tie_embed=True))
    assert not any(d.path.startswith("head") for d in declarations(model))
    hidden = model.hidden(tokens(1, 5)).main_BTD
    assert_close(model.logits(hidden), hidden @ model.embed.weight[...].T, F32, "logits")


def test_bfloat16_model_stays_near_float32():
    row = tokens(2, 40)
    config = dataclasses.replace(TINY, n_limited_groups=4)
    want = tiny_model(config)(row)
    got = tiny_model(config, compute=jnp.bfloat16)(row)
    assert got.dtype == jnp.float32
    # A token whose two best experts nearly tie may choose otherwise, so the typical row is what is compared.
    errors = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert np.median(errors) < 2 * BF16.bound


def test_routing_statistics_cover_main_layers_then_modules():
    routing = tiny_model().hidden(tokens(2, 16)).routing
    assert routing.counts_E.shape == (TINY.n_moe_layers + TINY.n_mtp, TINY.n_routed_experts)
    assert (np.asarray(routing.counts_E).sum(axis=1) == 2 * 16 * TINY.n_activated_experts).all()
    assert (
        tiny_model(dataclasses.replace(TINY, n_routed_experts=0, n_dense_layers=3, n_mtp=0))
        .hidden(tokens(1, 4))
        .routing
        is None
    )

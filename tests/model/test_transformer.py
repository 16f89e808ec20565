"""Properties of the whole model; its numbers against transformers and the oracles are in
test_equivalence.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.cache import empty_cache
from dsjax.model.parameters import declarations
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from tests.closeness import BF16, F32, LOGITS, assert_close
from tests.model.tiny import TINY, tiny_model, tokens


@jax.jit
def logits(model, row, segments=None):
    return model(row, segments)


def test_logits_do_not_see_the_future():
    model, row = tiny_model(), tokens(1, 40)
    changed = row.at[0, 25].set((row[0, 25] + 1) % TINY.vocab_size)
    got, want = logits(model, changed), logits(model, row)
    np.testing.assert_array_equal(got[:, :25], want[:, :25])
    assert np.abs(got[:, 25:] - want[:, 25:]).max(axis=-1).min() > 0


def test_packed_documents_equal_documents_alone():
    """Each document also stands at the start of a row of its own, followed by whatever."""
    model, row, lengths = tiny_model(), tokens(1, 40), (13, 20, 7)
    segments = jnp.repeat(jnp.asarray([[1, 2, 3]], jnp.int32), np.array(lengths), axis=1)
    packed, joined = logits(model, row, segments), logits(model, row)
    for start, length in zip((0, 13, 33), lengths, strict=True):
        alone = logits(model, jnp.roll(row, -start, axis=1))[:, :length]
        assert_close(packed[:, start : start + length], alone, F32, f"document at {start}")
    assert np.abs(joined - packed)[:, 13:].max() > 1e-3  # without isolation they differ


def test_batch_rows_do_not_meet():
    model, rows = tiny_model(), tokens(3, 40)
    assert_close(logits(model, rows)[1:2], logits(model, rows[1:2]), F32, "logits")


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
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, TINY.dim)), jnp.float32)
    assert_close(model.logits(hidden), hidden @ model.embed.weight[...].T, F32, "logits")


def test_bfloat16_model_stays_near_float32():
    row = tokens(1, 40)
    config = dataclasses.replace(TINY, n_limited_groups=4)
    want = logits(tiny_model(config), row)
    got = logits(tiny_model(config, compute=jnp.bfloat16), row)
    assert got.dtype == jnp.float32
    # A token whose two best experts nearly tie may choose otherwise, so the typical row is what is
    # compared.
    errors = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert np.median(errors) < 2 * BF16.bound


def test_routing_statistics_cover_main_layers_then_modules():
    """A module counts the positions whose further token exists, so one fewer a row and depth."""
    routing = jax.jit(lambda model, row: model.hidden(row).routing)(tiny_model(), tokens(2, 16))
    assert routing.counts_E.shape == (TINY.n_moe_layers + TINY.n_mtp, TINY.n_routed_experts)
    positions = np.array([16, 16, 15, 14])
    np.testing.assert_array_equal(
        np.asarray(routing.counts_E).sum(axis=1), 2 * positions * TINY.n_activated_experts
    )


def test_dense_model_has_no_routing():
    dense = dataclasses.replace(TINY, n_routed_experts=0, n_dense_layers=3, n_mtp=0)
    assert jax.eval_shape(lambda m, r: m.hidden(r), tiny_model(dense), tokens(1, 4)).routing is None


# YaRN from 8 tokens on, and without a latent for queries; grouped queries with biases.
YARN = dataclasses.replace(
    TINY, q_lora_rank=0, rope_scaling="yarn", rope_factor=40.0, original_seq_len=8, mscale=0.707,
    mscale_all_dim=0.707,
)  # fmt: skip
GROUPED = dataclasses.replace(TINY, attention="gqa", n_kv_heads=2, head_dim=8, qkv_bias=True)
LENGTH, ENDS = 40, (25, 7, 16)  # of the rows' prompts


@functools.partial(jax.jit, static_argnames="absorbed", donate_argnums=3)
def extend(model, tokens_BT, starts_B, cache, *, absorbed):
    extended = model.extend(tokens_BT, starts_B, cache, absorbed=absorbed)
    return model.logits(extended.main_BTD), extended.mtp_input_BTD, extended.cache


def cached_model(config):
    """The model with all its router biases below 0, and room in its cache for three rows."""
    model = jax.tree.map(lambda leaf: leaf, tiny_model(config))
    bias = model.moe_layers.ffn.gate.bias
    model.moe_layers.ffn.gate.bias = bias.copy(bias[...] - 2)
    return model, empty_cache(config, 3, 64, jnp.float32, mtp=True)


@pytest.mark.parametrize(
    "config",
    [TINY, pytest.param(YARN, marks=pytest.mark.heavy), GROUPED],
    ids=["mla", "yarn", "gqa"],
)
def test_decode_logits_equal_teacher_forced_logits(config):
    """Prompts of different lengths run in two chunks of 16, filled up with whatever; then rows
    decode, each at a position of its own. What comes in chunks comes expanded, the rest absorbed.
    """
    model, cache = cached_model(config)
    rows = np.asarray(tokens(3, LENGTH))
    want = logits(model, rows)
    prompts = np.where(np.arange(32) < np.array(ENDS)[:, None], rows[:, :32], 95)
    for start in (0, 16):
        starts = np.full(3, start, np.int32)
        got, _, cache = extend(model, prompts[:, start : start + 16], starts, cache, absorbed=False)
        for row, end in enumerate(ENDS):
            own = slice(0, max(end - start, 0))
            assert_close(got[row, own], want[row, start : start + 16][own], LOGITS, "prefill")
    for step in range(LENGTH - max(ENDS)):
        at = np.array(ENDS, np.int32) + step
        new = rows[np.arange(3), at][:, None]
        got, _, cache = extend(model, new, at, cache, absorbed=True)
        assert_close(got[:, 0], want[np.arange(3), at], LOGITS, f"step {step}")


def test_absorbed_attention_equals_expanded():
    """Beyond YaRN's original length, where a forgotten mscale would show in either."""
    model, cache = cached_model(YARN)
    rows, starts = tokens(3, 16), jnp.asarray([0, 0, 0], jnp.int32)
    copy = jax.tree.map(jnp.copy, cache)
    absorbed, hidden, cache = extend(model, rows, starts, cache, absorbed=True)
    expanded, other_hidden, copy = extend(model, rows, starts, copy, absorbed=False)
    assert_close(absorbed, expanded, F32, "logits")
    assert_close(hidden, other_hidden, F32, "hidden")
    for got, want in zip(jax.tree.leaves(cache), jax.tree.leaves(copy), strict=True):
        assert_close(got, want, F32, "entries")


@pytest.mark.parametrize("after_norm", [True, pytest.param(False, marks=pytest.mark.heavy)])
def test_cached_mtp_modules_equal_the_training_forward(after_norm):
    """Module k at position p reads token p + k; both modules follow the main model in chunks."""
    config = dataclasses.replace(TINY, mtp_after_final_norm=after_norm)
    model, cache = cached_model(config)
    rows = tokens(3, 32)
    want = jax.jit(lambda model, rows: model.hidden(rows).mtp_DBTD)(model, rows)

    @functools.partial(jax.jit, static_argnums=1)
    def run(model, depth, tokens_BT, hidden_BTD, starts_B, cache):
        return model.extend_mtp(depth, tokens_BT, hidden_BTD, starts_B, cache)

    padded = jnp.pad(rows, ((0, 0), (0, 2)))
    for start in (0, 16):
        starts = jnp.full((3,), start, jnp.int32)
        _, hidden, cache = extend(model, rows[:, start : start + 16], starts, cache, absorbed=False)
        for depth in range(2):
            ahead = padded[:, start + depth + 1 :][:, :16]
            hidden, normed, cache = run(model, depth, ahead, hidden, starts, cache)
            known = slice(0, 31 - depth - start)  # the last positions have no token to read
            assert_close(
                normed[:, known], want[depth, :, start : start + 16][:, known], F32, f"{depth}"
            )


def test_size_of_decoding_program_does_not_grow_with_depth():
    def size(n_layers):
        config = dataclasses.replace(TINY, n_layers=n_layers)
        model = Transformer(config, Policy(jnp.float32))
        cache = jax.eval_shape(lambda: empty_cache(config, 2, 64, jnp.float32))
        row = jax.ShapeDtypeStruct((2,), jnp.int32)
        step = jax.jit(
            lambda model, row, cache: model.extend(row[:, None], row, cache, absorbed=True)
        )
        return len(step.lower(model, row, cache).as_text())

    assert size(12) < 1.02 * size(3)

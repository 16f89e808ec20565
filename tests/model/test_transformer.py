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

from dsjax.kernels import likeliest_token
from dsjax.kernels.target import HOPPER
from dsjax.model.cache import empty_cache
from dsjax.model.inputs import read_tokens
from dsjax.model.mla import MLA
from dsjax.model.parameters import declarations
from dsjax.model.transformer import Embeddings, Transformer
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
# With a latent of this width one token is cheaper absorbed and a chunk of 16 expanded.
WIDE = dataclasses.replace(TINY, kv_lora_rank=32)
LENGTH, ENDS = 40, (25, 7, 16)  # of the rows' prompts


@functools.partial(jax.jit, donate_argnums=3)
def extend(model, tokens_BT, starts_B, cache):
    extended = model.extend(tokens_BT, starts_B, cache)
    return model.logits(extended.main_BTD), extended.mtp_input_BTD, extended.cache


def cached_model(config):
    """The model with all its router biases below 0, and room in its cache for three rows."""
    model = jax.tree.map(lambda leaf: leaf, tiny_model(config))
    bias = model.moe_layers.ffn.gate.bias
    model.moe_layers.ffn.gate.bias = bias.copy(bias[...] - 2)
    return model, empty_cache(config, 3, 64, jnp.float32, mtp=True)


@pytest.mark.parametrize(
    "config",
    [WIDE, pytest.param(YARN, marks=pytest.mark.heavy), GROUPED],
    ids=["mla", "yarn", "gqa"],
)
def test_decode_logits_equal_teacher_forced_logits(config):
    """Prompts of different lengths run in two chunks of 16, filled up with whatever; then rows
    decode, each at a position of its own. The first model expands chunks and absorbs single tokens.
    """
    model, cache = cached_model(config)
    rows = np.asarray(tokens(3, LENGTH))
    want = logits(model, rows)
    prompts = np.where(np.arange(32) < np.array(ENDS)[:, None], rows[:, :32], 95)
    for start in (0, 16):
        starts = np.full(3, start, np.int32)
        got, _, cache = extend(model, prompts[:, start : start + 16], starts, cache)
        for row, end in enumerate(ENDS):
            own = slice(0, max(end - start, 0))
            assert_close(got[row, own], want[row, start : start + 16][own], LOGITS, "prefill")
    for step in range(LENGTH - max(ENDS)):
        at = np.array(ENDS, np.int32) + step
        new = rows[np.arange(3), at][:, None]
        got, _, cache = extend(model, new, at, cache)
        assert_close(got[:, 0], want[np.arange(3), at], LOGITS, f"step {step}")


def test_absorbed_attention_equals_expanded():
    """Beyond YaRN's original length, where a forgotten mscale would show in either."""
    config = dataclasses.replace(YARN, kv_lora_rank=32)
    assert MLA.absorbs(config, 4) and not MLA.absorbs(config, 16)
    model, absorbed = cached_model(config)
    rows, starts = tokens(3, 16), jnp.asarray([0, 0, 0], jnp.int32)
    expanded = jax.tree.map(jnp.copy, absorbed)
    want, want_hidden, expanded = extend(model, rows, starts, expanded)
    for start in range(0, 16, 4):
        few = slice(start, start + 4)
        got, hidden, absorbed = extend(model, rows[:, few], starts + start, absorbed)
        assert_close(got, want[:, few], F32, "logits")
        assert_close(hidden, want_hidden[:, few], F32, "hidden")
    for got, want in zip(jax.tree.leaves(absorbed), jax.tree.leaves(expanded), strict=True):
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
        _, hidden, cache = extend(model, rows[:, start : start + 16], starts, cache)
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
        step = jax.jit(lambda model, row, cache: model.extend(row[:, None], row, cache))
        return len(step.lower(model, row, cache).as_text())

    assert size(12) < 1.02 * size(3)


def expert_choices(model, rows):
    """Natural choices of all MoE layers, in the order of a cache's prefill."""
    cache = empty_cache(model.config, *rows.shape, jnp.float32)
    starts_B = jnp.zeros(len(rows), jnp.int32)
    return jax.jit(lambda m, r, c: m.extend(r, starts_B, c, routing=True).experts_LBTK)(
        model, rows, cache
    )


def states(model, rows, experts_LBTK=None):
    hidden = jax.jit(lambda m, r, e: m.hidden(r, experts_LBTK=e))(model, rows, experts_LBTK)
    return hidden.main_BTD, hidden.mtp_DBTD, hidden.routing.counts_E


def test_extend_returns_the_choices_of_every_layer():
    model, rows = tiny_model(), tokens(2, 24)
    chosen = np.asarray(expert_choices(model, rows))
    assert chosen.shape == (TINY.n_moe_layers, 2, 24, TINY.n_activated_experts)
    counts = [np.bincount(layer.ravel(), minlength=TINY.n_routed_experts) for layer in chosen]
    np.testing.assert_array_equal(states(model, rows)[2][: TINY.n_moe_layers], counts)


def test_decoding_without_choices_is_the_program_without_them():
    """Not asked for, choices leave no trace in the program."""
    model, cache = cached_model(TINY)
    row, at = jnp.zeros((3, 1), jnp.int32), jnp.zeros(3, jnp.int32)

    def results(routing):
        run = jax.jit(lambda m, c: m.extend(row, at, c, routing=routing))
        return len(jax.tree.leaves(jax.eval_shape(run, model, cache)))

    assert results(True) == results(False) + 1


def test_replayed_natural_choices_change_no_bit():
    model, rows = tiny_model(), tokens(2, 24)
    for got, want in zip(
        states(model, rows, expert_choices(model, rows)), states(model, rows), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_overruled_routers_are_marked_layer_by_layer():
    model, rows = tiny_model(), tokens(2, 24)
    replayed = expert_choices(model, rows)
    replayed = replayed.at[1, 0, 5].set((replayed[1, 0, 5] + 1) % TINY.n_routed_experts)
    run = jax.jit(lambda model, rows, e: model.hidden(rows, experts_LBTK=e).routing.overruled_BT)
    overruled = np.asarray(run(model, rows, replayed))
    assert overruled.shape == (TINY.n_moe_layers + TINY.n_mtp, 2, 24)
    assert not overruled[0].any()
    np.testing.assert_array_equal(np.argwhere(overruled[1]), [[0, 5]])
    assert not np.asarray(run(model, rows, None)).any()


def test_other_choices_are_obeyed():
    model, rows = tiny_model(), tokens(2, 24)
    others = (expert_choices(model, rows) + 1) % TINY.n_routed_experts
    got, want = states(model, rows, others), states(model, rows)
    assert np.abs(got[0] - want[0]).max() > 1e-2
    counts = [np.bincount(x.ravel(), minlength=TINY.n_routed_experts) for x in np.asarray(others)]
    np.testing.assert_array_equal(got[2][: TINY.n_moe_layers], counts)
    # The modules' choices may be given as well.
    everywhere = jnp.zeros((4, *others.shape[1:]), jnp.int32).at[..., 1].set(1)
    counts_E = states(model, rows, everywhere)[2]
    assert (counts_E[:, :2] > 0).all() and (counts_E[:, 2:] == 0).all()


@pytest.mark.heavy
@pytest.mark.parametrize("remat", ["none", "selective"])
def test_gradients_reach_routers_through_replayed_choices(remat):
    """The same gradients as with natural choices, but for the order of sums: the two programs
    compile to different ones, and float32 sums then differ in the last bits.
    """
    model, rows = tiny_model(), tokens(2, 24)

    def loss(model, experts_LBTK):
        hidden = model.hidden(rows, remat=remat, experts_LBTK=experts_LBTK)
        return jnp.square(hidden.main_BTD).sum()

    gradient = jax.jit(jax.grad(loss))
    got, want = gradient(model, expert_choices(model, rows)), gradient(model, None)
    assert np.abs(got.moe_layers.ffn.gate.weight[...]).max(axis=(1, 2)).min() > 0
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=5e-6 * np.abs(w).max())


def test_embeddings_replace_those_of_their_tokens_alone():
    """Given the tokens' own embeddings nothing changes, whatever ids stand there. Other embeddings
    change only what follows. Gradients go to the given embeddings instead of the table.
    """
    model, rows = tiny_model(), tokens(2, 24)
    given_BT = jnp.zeros((2, 24), bool).at[1, 5:9].set(True)
    pictures = jnp.where(given_BT, TINY.vocab_size + 7, rows)  # no ids of the vocabulary

    def main(model, rows, values_BTD):
        embeddings = values_BTD if values_BTD is None else Embeddings(given_BT, values_BTD)
        return model.hidden(rows, mtp=False, embeddings=embeddings).main_BTD

    run = jax.jit(main)
    own_BTD = model.embed(rows)
    want, got = run(model, rows, None), run(model, pictures, own_BTD)
    np.testing.assert_array_equal(got, want)
    other = run(model, pictures, own_BTD + 1)
    np.testing.assert_array_equal(other[0], want[0])
    np.testing.assert_array_equal(other[1, :5], want[1, :5])
    assert (np.abs(other[1, 5:] - want[1, 5:]).max(axis=-1) > 1e-3).all()

    def loss(model, values_BTD):
        return jnp.square(main(model, pictures, values_BTD)[1, 5]).sum()

    _, into_values = jax.jit(jax.grad(loss, (0, 1)))(model, own_BTD)
    assert (np.abs(into_values).max(axis=-1) > 0).tolist() == [
        [False] * 24,
        [i == 5 for i in range(24)],
    ]


def test_extend_takes_embeddings():
    model, cache = cached_model(TINY)
    rows, starts = tokens(3, 16), jnp.zeros(3, jnp.int32)
    given_BT = jnp.zeros((3, 16), bool).at[:, 2:5].set(True)
    embeddings = Embeddings(given_BT, model.embed(rows))
    run = jax.jit(lambda m, r, c, e: m.extend(r, starts, c, embeddings=e).main_BTD)
    got = run(model, jnp.where(given_BT, 0, rows), cache, embeddings)
    np.testing.assert_array_equal(got, run(model, rows, cache, None))


def test_skipped_tokens_count_for_rope_alone():
    """Behind one token, as far away as if three that nobody sees were between."""
    model, row = tiny_model(), tokens(1, 12)
    hidden = functools.partial(jax.jit(Transformer.extend), model)
    first = hidden(row[:, :1], jnp.zeros(1, jnp.int32), empty_cache(TINY, 1, 16, jnp.float32))
    places = jnp.array([0, *range(4, 12)], jnp.int32)[None]
    inputs = read_tokens(row[:, places[0]], None, isolate=True, n_mtp=0)
    want = model.forward(inputs._replace(positions=places)).main_BTD[:, 1:]
    one = jnp.ones(1, jnp.int32)
    got = hidden(row[:, 4:], one, first.cache, skipped_B=3 * one).main_BTD
    assert_close(got, want, LOGITS)
    near = hidden(row[:, 4:], one, first.cache, skipped_B=0 * one).main_BTD
    assert np.abs(near - want).max() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_likeliest_token_on_a_hopper(tied, monkeypatch):
    """Hidden states that are columns of the head are followed by the tokens of those columns."""
    run = functools.partial(likeliest_token.likeliest_token, interpret=True)
    monkeypatch.setattr(likeliest_token, "likeliest_token", run)
    config = dataclasses.replace(TINY, dim=64, vocab_size=96, tie_embed=tied)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model(config))
    model.policy = Policy(jnp.bfloat16, HOPPER)
    weight_D = jnp.linspace(0.5, 1.5, 64, dtype=jnp.bfloat16)
    model.norm.weight.set_value(weight_D)
    ids = np.asarray([[5], [90], [0]])
    x_BTD = (model.head_weight() / weight_D[:, None]).T[ids]
    found = jax.jit(lambda model, x_BTD: model.likeliest(x_BTD))(model, 100 * x_BTD)
    np.testing.assert_array_equal(found, ids)
    assert found.dtype == jnp.int32

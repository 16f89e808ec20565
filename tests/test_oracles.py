"""The oracles against worked examples: numbers computed by hand or printed in the papers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import ModelConfig
from dsjax.model import rope as model_rope
from dsjax.model.router import route
from tests.golden.checkpoint import replaced
from tests.oracles import attention, experts, losses, rope

MLA = ModelConfig(
    vocab_size=8, dim=8, n_layers=1, n_heads=1, inter_dim=8, kv_lora_rank=4, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, rope_scaling="yarn", rope_factor=40.0,
    original_seq_len=4096,
    moe_inter_dim=4, n_routed_experts=8, n_activated_experts=3, n_expert_groups=4,
    n_limited_groups=2,
    router_bias=True, norm_topk=True, route_scale=2.5,
)  # fmt: skip
V2 = replaced(
    MLA,
    score_func="softmax",
    group_score="max",
    router_bias=False,
    norm_topk=False,
    route_scale=16.0,
)
LOGITS = np.array([0.5, -1.0, 1.2, 0.3, -0.2, 0.1, 0.9, -2.0])
BIAS = np.array([0, 0.3, -0.4, 0, 0.2, 0.05, 0, 0.1])


@pytest.mark.parametrize("frequencies", [rope.frequencies, model_rope.inverse_frequencies])
def test_yarn_frequencies_of_v3(frequencies):
    got = frequencies(MLA)
    want = {
        10: 0.0562341,
        11: 0.0390069,
        16: 0.0055,
        22: 1.77828e-4,
        23: 3.33380e-5,
        31: 3.33380e-6,
    }
    for pair, value in want.items():
        assert got[pair] == pytest.approx(value, rel=2e-6), pair
    assert got[23] == pytest.approx(10000 ** (-46 / 64) / 40, rel=1e-12)


@pytest.mark.parametrize("scale", [rope.softmax_scale, model_rope.attention_scale])
@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, 0.13523378),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 0.11472139),
        ({"rope_scaling": "none"}, 0.07216878),
    ],
)
def test_softmax_scale_of_v3_and_v2(scale, change, want):
    assert scale(replaced(MLA, **change)) == pytest.approx(want, rel=1e-7)


def test_llama3_frequencies_keep_short_waves_and_stretch_long_ones():
    config = replaced(
        MLA, rope_scaling="llama3", rope_factor=8.0, original_seq_len=8192, rope_theta=5e5
    )
    plain = 5e5 ** (-np.arange(0, 64, 2) / 64)
    waves = 2 * math.pi / plain
    got = rope.frequencies(config)
    np.testing.assert_allclose(got[waves < 2048], plain[waves < 2048])
    np.testing.assert_allclose(got[waves > 8192], plain[waves > 8192] / 8)
    between = (waves > 2048) & (waves < 8192)
    assert between.any() and np.all(
        (got[between] < plain[between]) & (got[between] > plain[between] / 8)
    )


def test_rotation_depends_on_distance_alone():
    config = replaced(MLA, rope_scaling="none")
    q, k = np.random.default_rng(0).standard_normal((2, 1, 64))
    for rotate in (rope.rotate_pairs, rope.rotate_halves):
        near = rotate(q, np.array([7]), config) @ rotate(k, np.array([3]), config).T
        far = rotate(q, np.array([507]), config) @ rotate(k, np.array([503]), config).T
        np.testing.assert_allclose(near, far)
        np.testing.assert_allclose(rotate(q, np.array([0]), config), q)


def test_rotations_agree_up_to_a_permutation_of_channels():
    x = np.random.default_rng(0).standard_normal((5, 64))
    halves_first = np.concatenate([np.arange(0, 64, 2), np.arange(1, 64, 2)])
    places = np.arange(5)
    np.testing.assert_allclose(
        rope.rotate_pairs(x, places, MLA)[:, halves_first],
        rope.rotate_halves(x[:, halves_first], places, MLA),
    )


def ours(logits, bias, config):
    routing = route(
        jnp.asarray(logits[None], jnp.float32),
        None if bias is None else jnp.asarray(bias, jnp.float32),
        config,
    )
    return experts.Choice(
        routing.experts_MK[0].tolist(),
        routing.weights_MK[0].tolist(),
        np.asarray(routing.scores_ME[0]),
    )


@pytest.mark.parametrize("router", [experts.route, ours])
def test_router_of_v3_on_the_worked_example(router):
    choice = router(LOGITS, BIAS, MLA)
    want = [0.622459, 0.268941, 0.768525, 0.574443, 0.450166, 0.524979, 0.710950, 0.119203]
    np.testing.assert_allclose(choice.scores, want, atol=1e-6)
    assert choice.experts == [4, 0, 5]
    np.testing.assert_allclose(choice.weights, [0.704439, 0.974051, 0.821510], atol=2e-6)
    assert sum(choice.weights) == pytest.approx(2.5)


@pytest.mark.parametrize("router", [experts.route, ours])
def test_router_of_v2_on_the_worked_example(router):
    choice = router(LOGITS, None, V2)
    np.testing.assert_allclose(
        choice.scores.reshape(4, 2).max(axis=1), [0.147136, 0.296296, 0.098628, 0.219501], atol=1e-6
    )
    assert choice.experts == [2, 6, 3]
    np.testing.assert_allclose(choice.weights, [4.740731, 3.512020, 1.927438], atol=2e-5)


@pytest.mark.parametrize("router", [experts.route, ours])
def test_masked_groups_lose_even_to_negative_scores(router):
    """Groups 1 and 2 are kept: experts 6 and 0 score more than 5 and are not chosen, nor would a 0
    be."""
    choice = router(LOGITS, np.full(8, -5.0), MLA)
    assert choice.experts == [2, 3, 5]
    assert all(weight > 0 for weight in choice.weights)


SCORES = np.array(
    [[0.9, 0.8, 0.1, 0.2], [0.7, 0.6, 0.5, 0.4], [0.2, 0.9, 0.8, 0.1], [0.6, 0.5, 0.1, 0.9]]
)


def test_sequence_loss_of_the_worked_example():
    assert losses.sequence_balance(SCORES, 2) == pytest.approx(1.128680, abs=1e-6)


def test_load_of_the_worked_example():
    counts = np.array([3, 3, 1, 1])
    assert losses.max_violation(counts) == 0.5
    np.testing.assert_array_equal(losses.bias_update(np.zeros(4), counts, 1.0), [-1, -1, 1, 1])


def test_even_load_makes_every_balance_loss_one():
    """Token t takes experts t, t + 1 (mod 4), scores are uniform: f = 1 everywhere, so sum f P =
    1."""
    uniform = np.full((4, 4), 0.25)
    chosen = [[t, (t + 1) % 4] for t in range(4)]
    assert losses.expert_balance(uniform, chosen) == pytest.approx(1)
    assert losses.device_balance(uniform, chosen, devices=2) == pytest.approx(1)
    # Tokens 1 and 3 reach both devices, 0 and 2 one each: six sends, D / (M T) = 2 / (2 * 4).
    assert losses.communication_balance(uniform, chosen, devices=2, limit=2) == pytest.approx(0.75)


def test_documents_weigh_by_their_tokens():
    segments = np.array([1, 1, 1, 2, 0])
    mean = losses.over_documents(
        lambda values: float(np.mean(values)), segments, [1.0, 2.0, 3.0, 10.0, 99.0]
    )
    assert mean == pytest.approx((3 * 2 + 10) / 4)


def test_mtp_loss_divides_by_the_sequence_not_by_its_own_terms():
    """Uniform logits over 8 words: T - k terms of log 8, divided by T."""
    tokens = np.arange(7) % 8
    logits = [np.zeros((6 - k, 8)) for k in (1, 2)]
    assert losses.mtp_loss(logits, tokens, 6) == pytest.approx(math.log(8) * (5 / 6 + 4 / 6) / 2)


def test_mtp_loss_reads_the_token_k_plus_one_ahead():
    tokens = np.array([3, 1, 4, 0, 5])
    logits = np.full((3, 6), -50.0)
    logits[np.arange(3), tokens[2:]] = 50.0
    assert losses.mtp_loss([logits], tokens, 4) == pytest.approx(0, abs=1e-12)


def test_positions_and_visibility_restart_with_each_document():
    segments = np.array([1, 1, 2, 2, 2])
    np.testing.assert_array_equal(attention.positions(segments), [0, 1, 0, 1, 2])
    visible = attention.visible(segments)
    assert visible[1].tolist() == [True, True, False, False, False]
    assert visible[3].tolist() == [False, False, True, True, False]

"""DPO and reward models' losses: printed values, a float64 oracle, and known mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import OptimConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.preference import Preference, PreferenceConfig
from dsjax.model.parameters import initialize
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.preference import (
    answer_logp,
    implicit_reward,
    label_loss,
    pair_loss,
    preference,
)
from dsjax.posttrain.reward_model import RewardModel, trains
from dsjax.precision.policy import Policy
from dsjax.train.optimizer import adamw
from dsjax.train.step import TrainState, split, train_step
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY, tiny_model
from tests.train.objectives import sums_of

MODEL = dataclasses.replace(TINY, n_layers=2, n_dense_layers=1, n_mtp=1)
LENGTH, PAIRS = 12, 4
CHOSEN, REJECTED = np.array([-12.3, -8.1]), np.array([-11.0, -9.7])
REFERENCE = np.array([[-12.9, -8.0], [-10.5, -9.0]])


def config(kind="dpo", beta=0.1, **train):
    return Preference(
        name="test",
        model=MODEL,
        preference=PreferenceConfig(kind=kind, beta=beta, sequence_length=LENGTH),
        train=TuningConfig(batch_size=PAIRS, loss_chunk=16, remat="none", **train),
    )


def batch(pairs=PAIRS, seed=0):
    """Rows of a prompt and an answer of different lengths, one of them as long as a row may be."""
    rng = np.random.default_rng(seed)
    rows = 2 * pairs
    tokens = rng.integers(0, MODEL.vocab_size, (rows, LENGTH + 1)).astype(np.int32)
    prompts, ends = rng.integers(1, 5, rows), rng.integers(6, LENGTH + 1, rows)
    ends[1] = LENGTH
    places = np.arange(LENGTH + 1)[None]
    inside = places < ends[:, None]
    return {
        "tokens": np.where(inside, tokens, 0),
        "segment_ids": inside.astype(np.int32),
        "counted": (inside & (places >= prompts[:, None])).astype(np.int32),
        # far enough apart for half of the pairs to be right
        "reference": (rng.normal(-30, 1, rows) + np.resize([-15, 0, 15, 0], rows)).astype("f4"),
        "label": (rng.random(rows) < 0.5).astype(np.float32),
    }


def on_device(rows):
    return {name: jnp.asarray(array) for name, array in rows.items()}


@pytest.fixture(scope="module")
def reward_model():
    base = tiny_model(MODEL)
    model = initialize(RewardModel(MODEL, Policy(jnp.float32)), jax.random.key(0))
    nnx.update(model, nnx.state(base))
    return model


def logp_of(model, rows):
    """Log-probability of each row's answer, from whole logits in float64."""
    logits = np.asarray(model(rows["tokens"][:, :-1], rows["segment_ids"][:, :-1]), np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    ids = np.asarray(rows["tokens"])[:, 1:, None]
    chosen = np.take_along_axis(logp, ids, axis=-1)[..., 0]
    return (chosen * np.asarray(rows["counted"])[:, 1:]).sum(axis=-1)


def minus_log_sigmoid(x):
    return np.log1p(np.exp(-x))


def test_losses_have_the_known_values():
    with jax.enable_x64(True):
        rewards = implicit_reward(jnp.array([CHOSEN, REJECTED]), jnp.array(REFERENCE), 0.1)
        np.testing.assert_allclose(pair_loss(*rewards), [0.639658919, 0.663597113], atol=5e-10)
        scores = jnp.array([[1.2, -0.3, 0.5], [0.7, 0.1, 0.5]])
        assert float(pair_loss(*scores).mean()) == pytest.approx(0.693413139, abs=5e-10)
        labelled = label_loss(jnp.array([1.2, 1.2, -40.0]), jnp.array([1.0, 0.0, 1.0]))
        want = [minus_log_sigmoid(1.2), minus_log_sigmoid(-1.2), 40.0]
        np.testing.assert_allclose(labelled, want, rtol=1e-12)


def test_derivatives_are_those_of_the_published_gradient():
    """Equation 7's gradient: beta times the sigmoid of the wrong way round."""
    beta = 0.3

    def loss(logp):
        return pair_loss(*implicit_reward(logp, jnp.array(REFERENCE), beta)).sum()

    with jax.enable_x64(True):
        logp = jnp.array([CHOSEN, REJECTED])
        got = jax.grad(loss)(logp)
        margin = beta * ((CHOSEN - REFERENCE[0]) - (REJECTED - REFERENCE[1]))
        want = beta / (1 + np.exp(margin))
        np.testing.assert_allclose(got, [-want, want], rtol=1e-12)
        step = 1e-5
        for place in np.ndindex(2, 2):
            up, down = (float(loss(logp.at[place].add(sign * step))) for sign in (1, -1))
            assert (up - down) / (2 * step) == pytest.approx(float(got[place]), abs=1e-8)


def test_dpo_sums_equal_the_oracle():
    model, rows = tiny_model(MODEL), on_device(batch())
    sums, _ = sums_of(preference(config(beta=0.2)), model, rows)
    logp, reference = logp_of(model, rows), np.asarray(rows["reference"], np.float64)
    rewards = (0.2 * (logp - reference)).reshape(-1, 2)
    margin = rewards[:, 0] - rewards[:, 1]
    assert_close(sums["loss"], minus_log_sigmoid(margin).sum(), F32, "loss")
    assert_close(sums["margin"], margin.sum(), F32, "margin")
    assert_close(sums["chosen_reward"], rewards[:, 0].sum(), F32, "reward of the chosen")
    assert float(sums["examples"]) == PAIRS and float(sums["right"]) == (margin > 0).sum()
    assert 0 < float(sums["right"]) < PAIRS
    made, _ = sums_of(answer_logp(config()), model, rows)
    assert_close(made["logp"], logp, F32, "reference")


@pytest.mark.parametrize("mistake", ["no reference", "mean of tokens", "prompt counted", "no end"])
def test_known_mistakes_of_dpo_are_seen(mistake):
    model, rows = tiny_model(MODEL), batch()
    want, _ = sums_of(preference(config(beta=0.2)), model, on_device(rows))
    counted = rows["counted"]
    if mistake == "no reference":
        rows["reference"] = np.zeros_like(rows["reference"])
    elif mistake == "prompt counted":
        rows["counted"] = rows["segment_ids"]
    elif mistake == "no end":
        rows["counted"] = counted * np.pad(counted[:, 1:], ((0, 0), (0, 1)))
    got, _ = sums_of(preference(config(beta=0.2)), model, on_device(rows))
    if mistake == "mean of tokens":
        logp = logp_of(model, on_device(rows)) / counted.sum(axis=-1)
        reference = rows["reference"] / counted.sum(axis=-1)
        margin = np.subtract(*(0.2 * (logp - reference)).reshape(-1, 2).T)
        got = {"loss": minus_log_sigmoid(margin).sum()}
    assert abs(float(got["loss"]) - float(want["loss"])) > 0.01 * float(want["loss"])


def test_reward_models_score_the_last_token(reward_model):
    rows = on_device(batch())
    hidden = reward_model.hidden(
        rows["tokens"][:, :-1], rows["segment_ids"][:, :-1], mtp=False
    ).main_BTD
    ends = np.asarray(rows["segment_ids"]).sum(axis=-1) - 1
    last = np.asarray(hidden, np.float64)[np.arange(2 * PAIRS), ends]
    scores = last @ np.asarray(reward_model.reward.weight[...], np.float64)[:, 0]
    sums, _ = sums_of(preference(config("bradley_terry")), reward_model, rows)
    margin = np.subtract(*scores.reshape(-1, 2).T)
    assert_close(sums["loss"], minus_log_sigmoid(margin).sum(), F32, "pairs")
    assert float(sums["right"]) == (margin > 0).sum()
    sums, _ = sums_of(preference(config("pointwise")), reward_model, rows)
    good = np.asarray(rows["label"]) > 0
    assert 0 < good.sum() < len(good)
    assert_close(
        sums["loss"], minus_log_sigmoid(np.where(good, scores, -scores)).sum(), F32, "labelled"
    )
    assert float(sums["right"]) == ((scores > 0) == good).sum()
    assert float(sums["examples"]) == 2 * PAIRS


def test_answer_of_several_turns_is_scored_at_its_end_alone(reward_model):
    rows = batch()
    want, _ = sums_of(preference(config("bradley_terry")), reward_model, on_device(rows))
    begins = rows["counted"].argmax(axis=-1)
    rows["counted"][np.arange(2 * PAIRS), begins + 1] = 0  # a turn of the user's in between
    assert (np.diff(rows["counted"], axis=-1) == 1).sum() > 2 * PAIRS
    got, _ = sums_of(preference(config("bradley_terry")), reward_model, on_device(rows))
    assert_close(got["loss"], want["loss"], F32, "loss")


@pytest.mark.parametrize("kind", ["dpo", "bradley_terry", "pointwise"])
def test_rows_that_fill_a_batch_count_nothing(kind, reward_model):
    model, rows = tiny_model(MODEL) if kind == "dpo" else reward_model, batch()
    filled = {
        name: np.concatenate([array, np.zeros((4, *array.shape[1:]), array.dtype)])
        for name, array in rows.items()
    }
    objective = preference(config(kind))
    alone, _ = sums_of(objective, model, on_device(rows))
    among, _ = sums_of(objective, model, on_device(filled))
    for name in alone:
        assert_close(among[name], alone[name], F32, name)


def state_after_a_step(kind, model, n_micro_batches, sizes=None):
    """Parameters after one step on a batch cut in some way, and what it reported."""
    optimizer = adamw(OptimConfig(clip_norm=0.0), trains)
    _, params, router = split(model)
    state = TrainState(params, router, optimizer.init(params))
    rows = {
        name: array.reshape(n_micro_batches, -1, *array.shape[1:])
        for name, array in on_device(batch()).items()
    }
    knobs = {"learning_rate": jnp.float32(1e-3), "bias_update_speed": jnp.float32(0)}
    declared = type(model)(model.config, Policy(jnp.float32))
    step = train_step(declared, optimizer, preference(config(kind)))
    with jax.set_mesh(make_mesh(sizes or {"data": 1}, 8 if sizes else 1)):
        state, metrics = jax.jit(step)(state, rows, knobs)
    return state.params, metrics


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["dpo", "bradley_terry"])
def test_step_is_the_same_however_the_batch_is_cut_and_spread(kind, reward_model):
    model = tiny_model(MODEL) if kind == "dpo" else reward_model
    params, metrics = state_after_a_step(kind, model, 1)
    assert set(metrics) >= {"loss", "accuracy", "grad_norm", "skipped"}
    again, same = state_after_a_step(kind, model, 2, {"context": 2, "expert": 2, "fsdp": 2})
    for name in ("loss", "accuracy", "grad_norm"):
        assert_close(same[name], metrics[name], F32, name)
    for got, want in zip(*map(jax.tree.leaves, (again, params)), strict=True):
        # Adam divides by the gradient's size, which magnifies rounding of the smallest.
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_step_is_the_same_in_a_pipeline():
    model = tiny_model(dataclasses.replace(MODEL, n_layers=3, n_mtp=0))  # two MoE layers
    params, metrics = state_after_a_step("dpo", model, 4)
    again, same = state_after_a_step("dpo", model, 4, {"pipe": 2, "fsdp": 2, "tensor": 2})
    for name in ("loss", "accuracy", "grad_norm"):
        assert_close(same[name], metrics[name], F32, name)
    for got, want in zip(*map(jax.tree.leaves, (again, params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5)


@pytest.mark.heavy
def test_what_a_reward_model_does_not_use_rests(reward_model):
    params, _ = state_after_a_step("bradley_terry", reward_model, 1)
    _, before, _ = split(reward_model)
    moved = {}
    for (path, got), (_, old) in zip(*map(nnx.to_flat_state, (params, before)), strict=True):
        same = np.array_equal(got[...], old[...])
        moved[path[0]] = moved.get(path[0], False) or not same
    assert not moved["head"] and not moved["mtp"]
    assert moved["reward"] and moved["embed"] and moved["moe_layers"] and moved["norm"]

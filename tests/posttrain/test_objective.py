"""The policy loss against numbers from outside, in float64, and against known mistakes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.posttrain import objective
from dsjax.posttrain.advantages import outcome_advantages, token_weights
from dsjax.posttrain.objective import PolicyOptions, policy_loss
from tests.posttrain import vectors

NEW, OLD, REF, SAMP = map(vectors.log_probabilities, ("new", "old", "ref", "samp"))
MASK = vectors.mask()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def arguments(scale, average):
    advantages = outcome_advantages(vectors.REWARDS, scale).reshape(-1, 1) * MASK
    weights = token_weights(vectors.LENGTHS, average, vectors.LONGEST)[:, None] * MASK
    return jnp.asarray(advantages), jnp.asarray(weights)


def inputs_of(options):
    ref = jnp.asarray(REF) if options.beta else None
    needs = options.truncate or options.keep[1] or options.off_policy
    return {"ref": ref, "samp": jnp.asarray(SAMP) if needs else None}


def loss_and_gradient(name):
    scale, average, options, *_ = vectors.CASES[name]
    options = PolicyOptions(**options)
    old = None if name == "on_policy" else jnp.asarray(OLD)

    def loss(new):
        return policy_loss(new, old, *arguments(scale, average), options, **inputs_of(options)).loss

    return jax.value_and_grad(loss)(jnp.asarray(NEW))


@pytest.mark.parametrize("name", vectors.CASES)
def test_loss_and_gradient_are_the_published_formula_s(name):
    *_, wanted, norm = vectors.CASES[name]
    loss, gradient = loss_and_gradient(name)
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, wanted, rtol=0, atol=1e-9)
    np.testing.assert_allclose(jnp.linalg.norm(gradient), norm, rtol=0, atol=1e-9)


def test_gradient_of_each_token():
    wanted = np.array(vectors.GRADIENT.split(), np.float64)
    _, gradient = loss_and_gradient("deepseek_math")
    np.testing.assert_allclose(gradient[MASK], wanted, rtol=0, atol=1e-9)


def test_gradient_on_policy_is_equation_21():
    advantages, weights = arguments("population", "sequence")
    _, gradient = loss_and_gradient("on_policy")
    wanted = -weights * (advantages + 0.04 * (np.exp(REF - NEW) - 1))
    np.testing.assert_allclose(gradient, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", [name for name in vectors.CASES if name != "on_policy"])
def test_gradient_is_that_of_differences(name):
    scale, average, options, *_ = vectors.CASES[name]
    options, step = PolicyOptions(**options), 1e-6

    def loss(new):
        args = arguments(scale, average)
        return policy_loss(new, jnp.asarray(OLD), *args, options, **inputs_of(options)).loss

    direction = np.random.default_rng(0).normal(size=NEW.shape)
    numerical = (loss(NEW + step * direction) - loss(NEW - step * direction)) / (2 * step)
    exact = (loss_and_gradient(name)[1] * direction).sum()
    np.testing.assert_allclose(numerical, exact, rtol=1e-7)


@pytest.mark.parametrize("name", ["deepseek_math", "gspo", "v32", "tis", "icepop"])
def test_packing_outputs_into_rows_changes_nothing(name):
    scale, average, options, wanted, norm = vectors.CASES[name]
    options = PolicyOptions(**options)
    advantages, weights = arguments(scale, average)
    # Three outputs per row, each behind a prompt of two tokens that holds what must not be read.
    lengths = np.array(vectors.LENGTHS)

    def packed(x, between=np.nan):
        rows = []
        for first in (0, 3):
            row = []
            for output in range(first, first + 3):
                row += [between, between, *np.asarray(x)[output, : lengths[output]]]
            rows.append(row + [between] * (18 - len(row)))
        return jnp.asarray(np.array(rows))

    outputs = packed(np.repeat(np.arange(1, 7)[:, None], 5, axis=1), 0).astype(jnp.int32)
    given = inputs_of(options)
    given = {key: None if x is None else packed(x) for key, x in given.items()}

    def loss(new):
        others = packed(OLD), packed(advantages), packed(weights, 0.0)
        return policy_loss(new, *others, options, outputs=outputs, **given).loss

    value, gradient = jax.value_and_grad(loss)(packed(NEW))
    np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-9)
    np.testing.assert_allclose(jnp.linalg.norm(gradient), norm, rtol=0, atol=1e-9)


def test_sums_count_what_happened():
    advantages, weights = arguments("sample", "sequence")
    options = PolicyOptions(beta=0.04)
    both = {"ref": jnp.asarray(REF), "samp": jnp.asarray(SAMP)}
    sums = policy_loss(jnp.asarray(NEW), jnp.asarray(OLD), advantages, weights, options, **both)
    sums, rho = jax.device_get(sums.sums), np.exp(NEW - OLD)
    assert sums["tokens"] == MASK.sum()
    advantages = np.asarray(advantages)
    assert sums["clipped_low"] == ((rho < 0.8) & (advantages < 0) & MASK).sum()
    assert sums["clipped_high"] == ((rho > 1.2) & (advantages > 0) & MASK).sum()
    assert sums["clipped_high"] > 0
    np.testing.assert_allclose(sums["surprise"], -NEW.sum())
    np.testing.assert_allclose(sums["gap"], np.abs(SAMP - OLD).sum())
    np.testing.assert_allclose(sums["gap_max"], np.abs(SAMP - OLD)[MASK].max())
    np.testing.assert_allclose(sums["rho_max"], rho[MASK].max())
    np.testing.assert_allclose(sums["k1"], (NEW - REF).sum())
    np.testing.assert_allclose(sums["k3"], (np.exp(REF - NEW) - (REF - NEW) - 1)[MASK].sum())


def test_off_policy_masks_an_output_whole():
    scale, average, options, *_ = vectors.CASES["v32"]
    args = jnp.asarray(NEW), jnp.asarray(OLD), *arguments(scale, average)
    options = dataclasses.replace(PolicyOptions(**options), beta=0.0)
    found = policy_loss(*args, options, samp=jnp.asarray(SAMP))
    assert found.sums["off_policy"] == 1 and not found.terms[4].any()
    assert found.terms[jnp.asarray([0, 1, 2, 3, 5]), 0].all()


@pytest.mark.parametrize("kl", ["k3", "rho_k3"])
def test_values_that_overflow_leave_a_finite_loss(kl):
    new, old = jnp.asarray([[-0.1, -1e4]]), jnp.asarray([[-1e4, -0.1]])
    advantages, weights = jnp.asarray([[-1.0, -1.0]]), jnp.asarray([[0.5, 0.5]])

    def loss(new):
        options = PolicyOptions(beta=0.1, kl=kl)
        return policy_loss(new, old, advantages, weights, options, ref=old).loss

    value, gradient = jax.value_and_grad(loss)(new)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


# Known mistakes of this field; each gives another number than the vectors.


def test_mean_of_means_over_micro_batches_is_another_loss():
    scale, average, options, wanted, _ = vectors.CASES["dapo"]
    advantages, _ = arguments(scale, average)

    def of(rows, lengths):
        weights = token_weights(lengths, average)[:, None] * MASK[rows]
        args = (jnp.asarray(x)[rows] for x in (NEW, OLD, advantages))
        return policy_loss(*args, jnp.asarray(weights), PolicyOptions(**options)).loss

    halves = of(slice(0, 3), vectors.LENGTHS[:3]), of(slice(3, 6), vectors.LENGTHS[3:])
    np.testing.assert_allclose(sum(halves) / 2, -0.137789824, atol=1e-9)
    # With the weights of the whole batch, sums of micro-batches add up to the loss.
    weights = token_weights(vectors.LENGTHS, average)[:, None] * MASK
    parts = [
        policy_loss(
            *(jnp.asarray(x)[rows] for x in (NEW, OLD, advantages, weights)),
            PolicyOptions(**options),
        ).loss
        for rows in (slice(0, 3), slice(3, 6))
    ]
    np.testing.assert_allclose(sum(parts), wanted, atol=1e-9)


def test_k1_in_the_loss_is_refused():
    with pytest.raises(ValueError, match="gradient of zero on policy"):
        PolicyOptions(beta=0.04, kl="k1")


@pytest.mark.parametrize("wrong", ["prompt in the mask", "end left out"])
def test_mask_decides(wrong):
    scale, average, options, wanted, _ = vectors.CASES["deepseek_math"]
    advantages, _ = arguments(scale, average)
    lengths = np.array(vectors.LENGTHS) + (1 if wrong == "prompt in the mask" else -1)
    mask = np.arange(5)[None] < np.clip(lengths, 1, 5)[:, None]
    weights = jnp.asarray(token_weights(mask.sum(axis=1), average)[:, None] * mask)
    advantages = outcome_advantages(vectors.REWARDS, scale).reshape(-1, 1) * mask
    args = jnp.asarray(NEW), jnp.asarray(OLD), jnp.asarray(advantages), weights
    loss = policy_loss(*args, PolicyOptions(**options), ref=jnp.asarray(REF)).loss
    assert abs(loss - wanted) > 1e-3


@pytest.mark.parametrize(
    "mutation",
    [
        ("jnp.minimum(rho * advantages", "jnp.maximum(rho * advantages"),
        ("log_rho = new - old", "log_rho = old - new"),
        ("jnp.exp(behind) - behind - 1", "-behind"),
        ("clip(safe(ref) - new", "clip(new - safe(ref)"),
        ("1 + (options.epsilon_high or options.epsilon)", "1 + options.epsilon"),
        ("rho * k3 if", "jax.lax.stop_gradient(rho) * k3 if"),
        ("factor = jnp.exp(jnp.clip(old - samp", "factor = jnp.exp(jnp.clip(samp - old"),
        ("behind <= options.off_policy", "behind <= 100 * options.off_policy"),
        ("<= high), factor, 0)", "<= high), 1.0, 0)"),
    ],
    ids=lambda mutation: mutation[1],
)
def test_vectors_catch(mutation, monkeypatch):
    path, (right, wrong) = Path(objective.__file__), mutation
    source = path.read_text()
    assert source.count(right) == 1
    mutated = {"__name__": objective.__name__}
    exec(compile(source.replace(right, wrong), path, "exec"), mutated)
    monkeypatch.setitem(globals(), "policy_loss", mutated["policy_loss"])
    off = []
    for name, (*_, wanted, norm) in vectors.CASES.items():
        loss, gradient = loss_and_gradient(name)
        off.append(max(abs(loss - wanted), abs(jnp.linalg.norm(gradient) - norm)))
    assert max(off) > 1e-4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beta": 0.1}, "beta=0.1 needs the reference"),
        ({"truncate": 2.0}, "need the engine's"),
        ({"keep": (0.5, 2.0)}, "need the engine's"),
    ],
)
def test_option_without_its_input_is_refused(options, match):
    args = jnp.asarray(NEW), jnp.asarray(OLD), *arguments("none", "token")
    with pytest.raises(ValueError, match=match):
        policy_loss(*args, PolicyOptions(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.0},
        {"epsilon_high": -0.1},
        {"beta": -1.0},
        {"kl": "k2"},
        {"ratio": "row"},
        {"keep": (2.0, 0.5)},
        {"keep": (0.5, 2.0), "truncate": 2.0},
    ],
)
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError):
        PolicyOptions(**options)

"""The losses of distillation against float64 sums, finite differences and printed values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.posttrain.distill import TopK, forward_kl, reverse_kl, top_k, top_k_kl

TEACHER, STUDENT = [2.0, 0.5, -1.0], [1.0, 1.0, 0.0]
VOCAB = 7


def softmax(logits, temperature):
    shares = np.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
    return shares / shares.sum(axis=-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(axis=-1)


def bucketed(p, q, ids):
    """KL over the given outcomes and the rest as one."""
    p, q = (np.append(x[ids], x.sum() - x[ids].sum()) for x in (p, q))
    return kl(p[p > 0], q[p > 0])


def random_logits(seed, *shape):
    return np.random.default_rng(seed).normal(scale=2.0, size=shape)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 0.279522773), (2.0, 0.08949218)])
def test_forward_kl_has_the_known_value(temperature, value):
    loss, _ = forward_kl(jnp.array(STUDENT), jnp.array(TEACHER), temperature)
    assert float(loss) / temperature**2 == pytest.approx(value, abs=5e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_divergences_equal_their_sums(temperature):
    student, teacher = random_logits(0, 5, VOCAB), random_logits(1, 5, VOCAB)
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    for function, want in ((forward_kl, kl(p, q)), (reverse_kl, kl(q, p))):
        values, _ = function(jnp.array(student), jnp.array(teacher), temperature)
        np.testing.assert_allclose(values, temperature**2 * want, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("name", ["forward", "reverse", "top_k"])
def test_derivatives_are_those_of_the_values(name, temperature):
    student, teacher = jnp.array(random_logits(0, VOCAB)), jnp.array(random_logits(1, VOCAB))

    def run(logits):
        if name == "top_k":
            return top_k_kl(logits, top_k(teacher, 3, temperature), temperature)
        return {"forward": forward_kl, "reverse": reverse_kl}[name](logits, teacher, temperature)

    _, derivative = run(student)
    step = 1e-5
    moves = np.concatenate([np.eye(VOCAB), -np.eye(VOCAB)]) * step
    up, down = np.asarray(jax.vmap(lambda move: run(student + move)[0])(moves)).reshape(2, -1)
    np.testing.assert_allclose(derivative, (up - down) / (2 * step), atol=1e-8)
    by_autodiff = jax.grad(lambda logits: run(logits)[0])(student)
    np.testing.assert_allclose(derivative, by_autodiff, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_derivative_of_forward_kl_is_the_difference_of_the_shares(temperature):
    student, teacher = random_logits(0, VOCAB), random_logits(1, VOCAB)
    _, derivative = forward_kl(jnp.array(student), jnp.array(teacher), temperature)
    want = temperature * (softmax(student, temperature) - softmax(teacher, temperature))
    np.testing.assert_allclose(derivative, want, rtol=1e-10)


def test_likeliest_tokens_and_the_mass_of_the_rest():
    teacher = random_logits(1, 4, 6, VOCAB)
    p = softmax(teacher, 2.0)
    ids, logp = top_k(jnp.array(teacher), 3, 2.0)
    np.testing.assert_array_equal(ids, np.argsort(-p, axis=-1)[..., :3])
    np.testing.assert_allclose(logp[..., :3], np.log(-np.sort(-p, axis=-1)[..., :3]), rtol=1e-12)
    np.testing.assert_allclose(np.exp(logp[..., 3]), np.sort(p, axis=-1)[..., :-3].sum(-1))
    assert ids.dtype == jnp.int32


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, VOCAB])
def test_top_k_counts_the_rest_as_one_token(k, temperature):
    student, teacher = random_logits(0, VOCAB), random_logits(1, VOCAB)
    given = top_k(jnp.array(teacher), k, temperature)
    value, derivative = top_k_kl(jnp.array(student), given, temperature)
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    want = temperature**2 * bucketed(p, q, np.asarray(given.ids))
    assert float(value) == pytest.approx(want, rel=1e-10)
    whole, whole_derivative = forward_kl(jnp.array(student), jnp.array(teacher), temperature)
    if k == VOCAB:
        assert float(value) == pytest.approx(float(whole), rel=1e-10)
        np.testing.assert_allclose(derivative, whole_derivative, rtol=1e-9)
    else:
        assert float(value) < float(whole)  # a coarser view shows less
    assert float(derivative.sum()) == pytest.approx(0.0, abs=1e-12)


def test_excluded_tokens_count_nothing():
    teacher = jnp.array([1.0, 0.0, -jnp.inf])
    student = jnp.array([0.5, 0.0, 0.3])
    p, q = softmax(np.array([1.0, 0.0]), 1.0), softmax(np.array([0.5, 0.0, 0.3]), 1.0)
    value, derivative = forward_kl(student, teacher, 1.0)
    assert float(value) == pytest.approx(kl(p, q[:2]), rel=1e-12)
    assert float(derivative[2]) == pytest.approx(q[2])
    value, derivative = reverse_kl(jnp.array([0.5, 0.0, -jnp.inf]), student, 1.0)
    assert np.isfinite(value) and np.isfinite(np.asarray(derivative)).all()
    given = TopK(jnp.array([0, 1]), jnp.log(jnp.array([*p, 0.0])))
    value, derivative = top_k_kl(student, given, 1.0)
    assert float(value) == pytest.approx(kl(p, q[:2]), rel=1e-12)
    assert float(derivative[2]) == pytest.approx(q[2])


def test_equal_models_have_no_loss_and_no_gradient():
    logits = jnp.array(random_logits(0, VOCAB))
    for value, derivative in (
        forward_kl(logits, logits, 2.0),
        reverse_kl(logits, logits, 2.0),
        top_k_kl(logits, top_k(logits, 2, 2.0), 2.0),
    ):
        assert float(value) == pytest.approx(0.0, abs=1e-12)
        np.testing.assert_allclose(derivative, np.zeros(VOCAB), atol=1e-12)

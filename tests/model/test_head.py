"""Chunked log-likelihoods against whole logits in float64, jax.grad, and one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model import token_sets
from dsjax.model.head import (
    map_logits,
    predict,
    token_nll,
    token_nll_and_entropy,
    token_scores,
    weighted_loss,
    weighted_nll,
)
from dsjax.parallel.context import arrange, restore
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from tests.closeness import BF16, F32, assert_close

BATCH, LENGTH, DIM, VOCAB = 2, 37, 16, 50
CHUNKS = [1, 16, 26, 1000]  # tokens: some divide the length, some do not, one exceeds it


def _operands(compute=jnp.float32, batch=BATCH, length=LENGTH):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(batch, length, DIM)), compute)
    weight = jnp.asarray(rng.normal(size=(DIM, VOCAB)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (batch, length)), jnp.int32)
    weights = rng.normal(size=(batch, length)) * (rng.random((batch, length)) < 0.7)
    return hidden, weight, targets, jnp.asarray(weights, jnp.float32)


def _float64(hidden, weight, targets):
    """Nats of each target, and the derivatives of each by its logits."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    hits = np.eye(VOCAB)[np.asarray(targets)]
    return -np.log((shares * hits).sum(axis=-1)), shares - hits


def _gradients(derivatives, hidden, weight, weights):
    dlogits = np.asarray(weights, np.float64)[..., None] * derivatives
    hidden = np.asarray(hidden, np.float64).reshape(-1, DIM)
    return dlogits @ np.asarray(weight, np.float64).T, hidden.T @ dlogits.reshape(-1, VOCAB)


@pytest.mark.parametrize(("compute", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_weighted_sum_equals_float64_in_value_and_gradient(chunk, compute, level):
    hidden, weight, targets, weights = _operands(compute)

    def run(hidden, weight):
        return 3.0 * weighted_nll(hidden, weight, targets, weights, Policy(compute), chunk)

    nll, derivatives = _float64(hidden, weight, targets)
    want = 3 * (np.asarray(weights) * nll).sum()
    got, gradients = jax.jit(jax.value_and_grad(run, (0, 1)))(hidden, weight)
    assert_close(got, want, level, "value")
    assert_close(run(hidden, weight), want, level, "value without gradient")
    for name, g, w in zip(
        ("hidden", "head"), gradients, _gradients(derivatives, hidden, weight, 3 * weights),
        strict=True,
    ):  # fmt: skip
        assert_close(np.asarray(g, np.float32), w, level, name)
    assert (gradients[0].dtype, gradients[1].dtype) == (compute, jnp.float32)


@pytest.mark.parametrize(("compute", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_values_per_token_equal_float64_in_value_and_gradient(chunk, compute, level):
    """The gradient of a function that is not linear in them."""
    hidden, weight, targets, weights = _operands(compute)

    def run(hidden, weight):
        nll_BT = token_nll(hidden, weight, targets, Policy(compute), chunk)
        return (weights * jnp.exp(-0.5 * nll_BT)).sum(), nll_BT

    nll, derivatives = _float64(hidden, weight, targets)
    (value, got), gradients = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(hidden, weight)
    assert got.dtype == jnp.float32
    assert_close(got, nll, level, "nats")
    assert_close(value, (np.asarray(weights) * np.exp(-0.5 * nll)).sum(), level, "value")
    cotangents = -0.5 * np.asarray(weights) * np.exp(-0.5 * nll)
    for name, g, w in zip(
        ("hidden", "head"), gradients, _gradients(derivatives, hidden, weight, cotangents),
        strict=True,
    ):  # fmt: skip
        assert_close(np.asarray(g, np.float32), w, level, name)


def test_values_per_token_have_the_gradient_of_the_plain_form():
    hidden, weight, targets, weights = _operands()

    def plain(hidden, weight):
        logp = jax.nn.log_softmax(jnp.matmul(hidden, weight))
        return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]

    def chunked(hidden, weight):
        return token_nll(hidden, weight, targets, Policy(jnp.float32), 10)

    got, want = (jax.vjp(f, hidden, weight)[1](weights) for f in (chunked, plain))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, F32, "gradient")


def test_weights_of_one_and_zero_select():
    """To the bit, also where what is left out is not finite."""
    hidden, weight, targets, _ = _operands()
    kept = np.random.default_rng(1).random((BATCH, LENGTH)) < 0.7
    broken = jnp.where(kept[..., None], hidden, jnp.inf)

    def run(hidden, weight, weights):
        return weighted_nll(hidden, weight, targets, weights, Policy(jnp.float32), 16)

    run = jax.jit(jax.value_and_grad(run, (0, 1)))
    value, (dhidden, dweight) = run(hidden, weight, jnp.asarray(kept, jnp.float32))
    assert not np.asarray(dhidden)[~kept].any()
    again, (dhidden_again, _) = run(broken, weight, jnp.asarray(kept, jnp.float32))
    assert float(again) == float(value)
    np.testing.assert_array_equal(dhidden_again, dhidden)
    # The head's gradient sums hidden state times derivative, infinity times 0 there.
    assert np.isfinite(dweight).all()


def test_scores_are_the_values_and_whether_each_is_the_likeliest():
    hidden, weight, targets, _ = _operands()
    logits = np.asarray(hidden) @ np.asarray(weight)
    targets = targets.at[:, ::3].set(logits.argmax(axis=-1)[:, ::3])
    nll, likeliest = token_scores(hidden, weight, targets, Policy(jnp.float32), 16)
    assert_close(nll, _float64(hidden, weight, targets)[0], F32, "nats")
    np.testing.assert_array_equal(likeliest, logits.argmax(axis=-1) == np.asarray(targets))
    assert np.asarray(likeliest)[:, ::3].all() and not np.asarray(likeliest).all()
    whole = predict(hidden[0], weight, targets[0], Policy(jnp.float32))
    assert_close(whole.logits, logits[0], F32, "logits")
    assert_close(whole.nll, nll[0], F32, "nats of whole logits")


def _from_another_head(logits, other, heads):
    """Half the squared distance of the logits to those of another model."""
    wanted = jnp.matmul(other, heads[0])
    return 0.5 * ((logits - wanted) ** 2).sum(axis=-1), logits - wanted


def _other_head(batch=BATCH, length=LENGTH):
    """Hidden states and head of a narrower model."""
    rng = np.random.default_rng(3)
    shapes = (batch, length, DIM // 2), (DIM // 2, VOCAB)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_any_loss_per_token_is_summed_with_its_gradient(chunk):
    hidden, weight, _, weights = _operands()
    other, other_weight = _other_head()

    def chunked(hidden, weight):
        return weighted_loss(
            _from_another_head, hidden, weight, other, weights, Policy(jnp.float32), chunk,
            (other_weight,),
        )  # fmt: skip

    def plain(hidden, weight):
        return (weights * _from_another_head(hidden @ weight, other, (other_weight,))[0]).sum()

    for got, want in zip(
        *(
            jax.tree.leaves(jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, weight))
            for f in (chunked, plain)
        ),
        strict=True,
    ):
        assert_close(got, want, F32, "value or gradient")
    assert_close(chunked(hidden, weight), plain(hidden, weight), F32, "value without gradient")


@pytest.mark.parametrize("chunk", CHUNKS)
def test_any_function_of_the_logits_is_mapped(chunk):
    hidden, weight, targets, _ = _operands()

    def largest(logits, targets):
        return jax.lax.top_k(logits, 3), targets

    (values, ids), same = map_logits(largest, hidden, weight, targets, Policy(jnp.float32), chunk)
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64)
    assert_close(values, -np.sort(-logits, axis=-1)[..., :3], F32, "values")
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=-1)[..., :3])
    np.testing.assert_array_equal(same, targets)


@pytest.mark.heavy
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"context": 4, "fsdp": 2}])
def test_result_is_the_same_on_eight_devices(sizes):
    hidden, weight, targets, weights = _operands(batch=8, length=40)

    def run(hidden, weight):
        hidden = jax.vmap(arrange, -1, -1)(hidden)
        placed = [arrange(x) for x in (targets, weights)]
        nll_BT = token_nll(hidden, weight, placed[0], Policy(jnp.float32), 48)
        total = weighted_nll(hidden, weight, *placed, Policy(jnp.float32), 48)
        other, other_weight = _other_head(batch=8, length=40)
        total += weighted_loss(
            _from_another_head, hidden, weight, jax.vmap(arrange, -1, -1)(other), placed[1],
            Policy(jnp.float32), 48, (other_weight,),
        )  # fmt: skip
        return total + (placed[1] * nll_BT**2).sum(), restore(nll_BT)

    run = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    (value, nll), gradients = run(hidden, weight)
    with jax.set_mesh(make_mesh(sizes, 8)):
        (got_value, got_nll), got_gradients = run(hidden, weight)
    assert_close(got_value, value, F32, "value")
    assert_close(got_nll, nll, F32, "nats")
    for g, w in zip(got_gradients, gradients, strict=True):
        assert_close(g, w, F32, "gradient")


@pytest.mark.parametrize("name", ["weighted_nll", "token_nll"])
def test_logits_of_the_whole_batch_never_exist(name):
    """The vocabulary is so wide that the batch's logits would dwarf all the program holds."""
    batch, length, dim, vocab, chunk = 4, 256, 8, 8192, 64
    hidden = jax.ShapeDtypeStruct((batch, length, dim), jnp.float32)
    weight = jax.ShapeDtypeStruct((dim, vocab), jnp.float32)
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32)

    def loss(hidden, weight, targets, weights):
        if name == "weighted_nll":
            return weighted_nll(hidden, weight, targets, weights, Policy(jnp.float32), chunk)
        return (weights * token_nll(hidden, weight, targets, Policy(jnp.float32), chunk)).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, weight, targets, weights).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < batch * length * vocab * 4 / 4
    assert temporary > chunk * vocab * 4 / 2  # the measurement measures


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_temperature_and_entropy_equal_float64(temperature):
    hidden, weight, targets, weights = _operands()

    def run(hidden, weight):
        values = token_nll_and_entropy(
            hidden, weight, targets, Policy(jnp.float32), 16, temperature
        )
        return (weights * values[0]).sum() + values[1].sum(), values

    (_, got), gradients = jax.value_and_grad(run, (0, 1), has_aux=True)(hidden, weight)
    scaled = np.asarray(weight, np.float64) / temperature
    nll, derivatives = _float64(hidden, scaled, targets)
    hits = np.eye(VOCAB)[np.asarray(targets)]
    shares = derivatives + hits
    assert_close(got[0], nll, F32, "nll")
    assert_close(got[1], -(shares * np.log(shares)).sum(axis=-1), F32, "entropy")
    # The entropy was added to the loss and has no gradient.
    dhidden, dweight = _gradients(derivatives, hidden, scaled, weights)
    assert_close(gradients[0], dhidden, F32, "hidden")
    assert_close(gradients[1], dweight / temperature, F32, "head")


@pytest.mark.parametrize("chunk", [16, 1000])
def test_prediction_is_renormalized_over_kept_ids(chunk):
    """Values and gradients in float64, with the ids that were cut off left out; a token of weight 0
    may have none.
    """
    hidden, weight, targets, weights = _operands()
    kept = np.random.default_rng(5).random((BATCH, LENGTH, VOCAB)) < 0.2
    np.put_along_axis(kept, np.asarray(targets)[..., None], True, axis=-1)
    counted = np.asarray(weights) != 0
    kept &= counted[..., None]
    words = token_sets.pack(jnp.asarray(kept))

    def run(hidden, weight):
        nll, entropy = token_nll_and_entropy(
            hidden, weight, targets, Policy(jnp.float32), chunk, 0.7, words
        )
        return jnp.where(weights != 0, weights * nll, 0.0).sum(), (nll, entropy)

    (_, got), gradients = jax.value_and_grad(run, (0, 1), has_aux=True)(hidden, weight)
    scaled = np.asarray(weight, np.float64) / 0.7
    logits = np.asarray(hidden, np.float64) @ scaled
    shares = np.where(kept, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    shares /= np.where(counted, shares.sum(axis=-1), 1)[..., None]
    hits = np.eye(VOCAB)[np.asarray(targets)]
    logs = np.log(np.where(shares > 0, shares, 1))
    nll, entropy = -(hits * logs).sum(axis=-1), -(shares * logs).sum(axis=-1)
    np.testing.assert_allclose(np.asarray(got[0])[counted], nll[counted], atol=1e-5)
    assert_close(got[1][counted], entropy[counted], F32, "entropy")
    derivatives = np.where(counted[..., None], shares - hits, 0)
    dhidden, dweight = _gradients(derivatives, hidden, scaled, weights)
    assert_close(gradients[0], dhidden, F32, "hidden")
    assert_close(gradients[1], dweight / 0.7, F32, "head")


def test_entropy_of_a_certain_prediction_is_zero():
    hidden, weight = jnp.ones((1, 1, 2)), jnp.asarray([[3e4, -3e4], [0.0, -jnp.inf]])
    targets = jnp.zeros((1, 1), jnp.int32)
    _, entropy = token_nll_and_entropy(hidden, weight, targets, Policy(jnp.float32), 1)
    np.testing.assert_array_equal(entropy, [[0.0]])

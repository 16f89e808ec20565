"""The chunked loss against whole logits and autodiff; document borders. Oracles of the papers are
in test_equivalence.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Config, DataConfig, PrecisionConfig, TrainConfig
from dsjax.precision.policy import Policy
from dsjax.train.loss import cross_entropy, pretraining, target_mask
from tests.closeness import BF16, F32, assert_close
from tests.model.tiny import TINY, tiny_model, tokens


def _whole(hidden, weight, targets, mask):
    logits = jnp.matmul(hidden.astype(jnp.float32), weight)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[
        ..., 0
    ]
    return -jnp.where(mask, chosen, 0.0).sum()


@pytest.mark.parametrize(("compute", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
@pytest.mark.parametrize("chunk", [1, 16, 26, 1000])
def test_chunked_loss_equals_whole_logits_in_value_and_gradient(chunk, compute, level):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 37, 16)), compute)
    weight = jnp.asarray(rng.normal(size=(16, 50)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (2, 37)), jnp.int32)
    mask = jnp.asarray(rng.random((2, 37)) < 0.7)

    def run(function):
        return jax.jit(jax.value_and_grad(lambda h, w: 3.0 * function(h, w), (0, 1)))(
            hidden, weight
        )

    got, got_grads = run(lambda h, w: cross_entropy(h, w, targets, mask, Policy(compute), chunk))
    want, want_grads = run(lambda h, w: _whole(h, w, targets, mask))
    assert_close(got, want, level, "loss")
    assert got_grads[1].dtype == jnp.float32
    assert_close(
        got_grads[0].astype(jnp.float32),
        want_grads[0].astype(jnp.float32),
        level,
        "hidden gradient",
    )
    assert_close(got_grads[1], want_grads[1], level, "weight gradient")
    without_gradient = cross_entropy(hidden, weight, targets, mask, Policy(compute), chunk)
    assert_close(3 * without_gradient, want, level, "loss without gradient")


def test_logits_of_the_whole_batch_never_exist():
    """The vocabulary is so wide that the batch's logits would dwarf all the program holds."""
    batch, length, dim, vocab, chunk = 4, 256, 8, 8192, 64
    hidden = jax.ShapeDtypeStruct((batch, length, dim), jnp.float32)
    weight = jax.ShapeDtypeStruct((dim, vocab), jnp.float32)
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch, length), jnp.bool_)

    def loss(hidden, weight, targets, mask):
        return cross_entropy(hidden, weight, targets, mask, Policy(jnp.float32), chunk)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, weight, targets, mask).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < batch * length * vocab * 4 / 4
    assert temporary > chunk * vocab * 4 / 2  # the measurement measures


def test_targets_end_at_the_row_at_padding_and_at_isolated_documents():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]], jnp.int32)
    want = {
        (1, False): [1, 1, 1, 1, 0],
        (1, True): [1, 1, 0, 1, 0],
        (2, False): [1, 1, 1, 0, 0],
        (2, True): [1, 0, 0, 0, 0],
        (3, False): [1, 1, 0, 0, 0],
        (3, True): [0, 0, 0, 0, 0],
    }
    for (ahead, isolate), mask in want.items():
        np.testing.assert_array_equal(
            target_mask(segments, ahead, isolate)[0], np.array(mask, bool)
        )


def _config(**data):
    return Config(
        name="x",
        model=TINY,
        data=DataConfig(sequence_length=24, **data),
        train=TrainConfig(loss_chunk=16),
        precision=PrecisionConfig(compute="float32"),
    )


def _sums(model, batch, config):
    """The sums of a micro-batch, and the balance losses of its layers."""
    objective = pretraining(config)
    rows = (batch[name][:, :-1] for name in ("tokens", "segment_ids"))
    hidden = model.hidden(*rows, **objective.forward._asdict())
    return objective.sums(model, hidden, batch, {}), hidden.routing


@pytest.mark.parametrize("isolate", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_losses_ignore_what_follows_padding(isolate):
    row = tokens(1, 25)
    segments = jnp.asarray([[1] * 11 + [2] * 6 + [0] * 8], jnp.int32)
    run = jax.jit(
        lambda model, row: _sums(
            model, {"tokens": row, "segment_ids": segments}, _config(isolate_documents=isolate)
        )
    )
    first, second = run(tiny_model(), row), run(tiny_model(), row.at[0, 17:].set(3))
    assert first[0].keys() == {"main", "mtp", "main_targets", "mtp_targets"}
    for name, value in first[0].items():
        assert_close(second[0][name], value, F32, name)
    assert_close(second[1].balance_loss, first[1].balance_loss, F32, "balance")
    assert float(first[0]["main_targets"]) == (15 if isolate else 16)


def test_model_without_experts_has_no_routing_terms():
    dense = dataclasses.replace(TINY, n_routed_experts=0, n_dense_layers=3, n_mtp=0)
    row = tokens(1, 25)
    batch = {"tokens": row, "segment_ids": jnp.ones_like(row)}
    sums, routing = _sums(tiny_model(dense), batch, dataclasses.replace(_config(), model=dense))
    assert routing is None and float(sums["mtp"]) == 0 < float(sums["main"])

"""A step minimises whatever objective it is given, however the batch is cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.checkpoint import store
from dsjax.config import OptimConfig
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.train.objective import ForwardPass, Objective, Weights, sum_over_micro_batches
from dsjax.train.optimizer import adamw
from dsjax.train.step import TrainState, abstract_state, split, train_step
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY, tiny_model, tokens

MODEL = dataclasses.replace(TINY, n_layers=2, n_dense_layers=0, n_mtp=1)
BATCH, LENGTH = 4, 8


def advantage_weighted() -> Objective:
    """Log-likelihoods weighted per token by the batch, averaged over the batch's nonzero weights:
    the shape of a policy gradient. MTP modules rest.
    """

    def targets(batch):
        return {"ids": batch["tokens"][..., 1:], "advantages": batch["advantages"][..., 1:]}

    def weights(targets, knobs):
        count = (targets["advantages"] != 0).sum().astype(jnp.float32)
        ones = jnp.ones(len(targets["ids"]), jnp.float32)
        return Weights({"policy": knobs["scale"] * ones / count}, 0 * ones)

    def sums(model, hidden, targets, knobs):
        logp = jax.nn.log_softmax(model.logits(hidden.main_BTD))
        chosen_BT = jnp.take_along_axis(logp, targets["ids"][..., None], axis=-1)[..., 0]
        policy = -(knobs["by_position"][None] * targets["advantages"] * chosen_BT).sum()
        return {"policy": policy, "logp": chosen_BT.sum()}

    def metrics(sums):
        return {"loss": sums["policy"], "logp": sums["logp"]}

    return Objective(ForwardPass(True, False, None, "none"), targets, weights, sums, metrics)


def _batch(n_micro_batches):
    rows = tokens(BATCH, LENGTH + 1)
    advantages = np.random.default_rng(1).normal(size=rows.shape).astype(np.float32)
    advantages[:, :3] = 0
    batch = {
        "tokens": rows,
        "segment_ids": jnp.ones_like(rows),
        "advantages": jnp.asarray(advantages),
    }
    return {k: x.reshape(n_micro_batches, -1, LENGTH + 1) for k, x in batch.items()}


BY_POSITION = np.linspace(0.5, 1.5, LENGTH, dtype=np.float32)
KNOBS = {
    "learning_rate": 1e-3,
    "bias_update_speed": 1e-3,
    "scale": 2.0,
    "by_position": BY_POSITION,  # an array that the objective reads
}


def _run(n_micro_batches, sizes=None, trains=lambda path: True):
    model, optimizer = tiny_model(MODEL), adamw(OptimConfig(clip_norm=0.0), trains)
    _, params, router = split(model)
    state = TrainState(params, router, optimizer.init(params))
    knobs = {name: jnp.asarray(value, jnp.float32) for name, value in KNOBS.items()}
    declared = Transformer(MODEL, Policy(jnp.float32))
    step = train_step(declared, optimizer, advantage_weighted())
    mesh = make_mesh(sizes or {"data": 1}, 2 if sizes else 1)
    with jax.set_mesh(mesh):
        return model, *jax.device_get(jax.jit(step)(state, _batch(n_micro_batches), knobs))


def _gradients(state):
    return jax.tree.map(lambda m: m / 0.1, state.optimizer["adam"].mu)


def _by_path(state):
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def whole():
    return _run(1)


def test_step_takes_the_gradient_of_the_weighted_sums(whole):
    model, state, metrics = whole
    batch = {name: x[0] for name, x in _batch(1).items()}

    def total(model):
        logp = jax.nn.log_softmax(model(batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]))
        chosen = jnp.take_along_axis(logp, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        count = jnp.float32(BATCH * (LENGTH + 1 - 3))
        weighted = jnp.asarray(BY_POSITION)[None] * batch["advantages"][:, 1:] * chosen
        return -2.0 * weighted.sum() / count, chosen.sum()

    (loss, logp), want = jax.jit(jax.value_and_grad(total, has_aux=True, allow_int=True))(model)
    assert_close(metrics["loss"], loss * (BATCH * (LENGTH + 1 - 3)) / 2, F32, "loss")
    assert_close(metrics["logp"], logp, F32, "a sum without a weight")
    for got, leaf in zip(*map(jax.tree.leaves, (_gradients(state), split(want)[1])), strict=True):
        assert_close(got, leaf, F32._replace(bound=5e-5), "gradient")


def test_result_does_not_depend_on_micro_batches(whole):
    _, state, metrics = _run(4)
    for name in whole[2]:
        assert_close(metrics[name], whole[2][name], F32._replace(bound=5e-5), name)
    for got, want in zip(
        *map(jax.tree.leaves, (_gradients(state), _gradients(whole[1]))), strict=True
    ):
        assert_close(got, want, F32._replace(bound=5e-5), "gradient")


@pytest.mark.heavy
def test_pipeline_minimises_the_same_objective(whole):
    _, state, metrics = _run(4, {"pipe": 2})
    for name in whole[2]:
        assert_close(metrics[name], whole[2][name], F32._replace(bound=5e-5), name)
    for got, want in zip(
        *map(jax.tree.leaves, (_gradients(state), _gradients(whole[1]))), strict=True
    ):
        assert_close(got, want, F32._replace(bound=5e-5), "gradient")


@pytest.mark.heavy
@pytest.mark.parametrize("sizes", [None, {"pipe": 2}], ids=str)
def test_parameters_that_train_move_as_if_all_did(whole, sizes, tmp_path):
    """In the layers and at their ends; the state that holds less is saved and read again."""
    trains = {("moe_layers", "attn", "wo"), ("head", "weight")}
    model, state, metrics = _run(4, sizes, lambda path: path in trains)
    assert_close(metrics["loss"], whole[2]["loss"], F32, "loss")
    before, wanted, after = map(_by_path, (split(model)[1], whole[1].params, state.params))
    for path, got in after.items():
        if path in trains:
            assert_close(got, wanted[path], F32, str(path))
            assert (got != before[path]).any()
        else:
            np.testing.assert_array_equal(got, before[path], str(path))
    assert set(_by_path(state.optimizer["adam"].mu)) == trains
    kept = store.Store(tmp_path, keep=1)
    kept.save(1, jax.tree.map(jnp.asarray, state), {})
    kept.close()
    optimizer = adamw(OptimConfig(clip_norm=0.0), lambda path: path in trains)
    declared = Transformer(MODEL, Policy(jnp.float32))
    abstract = abstract_state(declared, optimizer, make_mesh({"data": 1}, 1))
    restored = store.restore(tmp_path, 1, abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for found, leaf in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(found, leaf)


def test_modules_that_do_not_run_keep_their_bias(whole):
    model, state, _ = whole
    np.testing.assert_array_equal(
        state.router["mtp"]["layer"]["ffn"]["gate"]["bias"], model.mtp.layer.ffn.gate.bias[...]
    )
    moved = state.router["moe_layers"]["ffn"]["gate"]["bias"][...]
    assert (moved != model.moe_layers.ffn.gate.bias[...]).any()


@pytest.mark.parametrize("count", [1, 3])
def test_sum_over_micro_batches_adds_trees(count):
    batch = {"x": jnp.arange(count * 4.0).reshape(count, 4)}
    got = sum_over_micro_batches(
        lambda batch: {"sum": batch["x"].sum(), "first": batch["x"][0]}, batch
    )
    assert float(got["sum"]) == float(batch["x"].sum())
    assert float(got["first"]) == float(batch["x"][:, 0].sum())


def test_largest_numbers_are_kept_instead_of_added():
    batch = {"x": jnp.array([[1.0, 5.0], [2.0, 3.0], [4.0, 0.0]])}
    got = sum_over_micro_batches(
        lambda batch: {"x": batch["x"].sum(), "x_max": batch["x"].max()}, batch
    )
    assert float(got["x"]) == 15 and float(got["x_max"]) == 5

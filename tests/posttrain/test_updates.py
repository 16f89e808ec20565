"""One program for all minibatches of a step, and a reference that is replaced when it is due."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import PrecisionConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.initial import all_but_mtp
from dsjax.posttrain.minibatches import pack
from dsjax.posttrain.policy import policy_objective
from dsjax.posttrain.updates import RENEW, PolicyState, Timed, all_minibatches, with_reference
from dsjax.train.batches import place_all
from dsjax.train.optimizer import adamw
from dsjax.train.step import (
    TrainState,
    abstract_state,
    compile_step,
    declared_model,
    split,
    train_step,
)
from tests.model.tiny import tiny_model
from tests.posttrain.shapes import V3, config_of
from tests.posttrain.test_policy import LAYOUT, samples

pytestmark = pytest.mark.heavy
CONFIG = config_of(V3, beta=0.1, minibatches=2, replay=True)
KNOBS = {"learning_rate": 1e-2, "bias_update_speed": 0.0}


def made(sizes, *, compute="float32"):
    """A mesh, the plain step, the step of all minibatches, and a state on the mesh."""
    mesh = make_mesh(sizes, int(np.prod(list(sizes.values()))))
    declared = declared_model(V3, PrecisionConfig(compute=compute))
    optimizer = adamw(CONFIG.optim, all_but_mtp)
    abstract = abstract_state(declared, optimizer, mesh)
    _, params, router = split(tiny_model(V3))
    state = jax.tree.map(
        lambda x, a: jax.device_put(np.asarray(x), a.sharding),
        TrainState(params, router, optimizer.init(params)),
        abstract,
    )
    step = train_step(declared, optimizer, policy_objective(CONFIG))
    whole = with_reference(declared, abstract, keep=True)
    together = compile_step(all_minibatches(step, declared), whole, mesh)
    return mesh, compile_step(step, abstract, mesh), together, state, declared


def batch_on(mesh, parts):
    batch = pack(parts, LAYOUT, "sequence", 8)
    batch |= {"old": batch["samp"], "ref": batch["samp"] - np.float32(0.2)}
    return place_all(batch, mesh)


def knobs(renew=0.0, **changes):
    return {name: jnp.float32(x) for name, x in (KNOBS | changes | {RENEW: renew}).items()}


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def one_device():
    mesh, step, together, state, declared = made({"data": 1})
    parts = [samples()[:2], samples()[2:]]
    begun = with_reference(declared, state, keep=True)
    before = arrays(begun.reference)
    after, metrics = together(begun, batch_on(mesh, parts), knobs())
    return mesh, step, declared, parts, before, after, metrics


def test_minibatches_are_steps_one_after_the_other(one_device):
    mesh, step, _, parts, _, after, metrics = one_device
    *_, state, _ = made({"data": 1})
    losses, ratios = [], []
    own = {name: value for name, value in knobs().items() if name != RENEW}
    for part in parts:
        state, found = step(state, jax.tree.map(lambda x: x[0], batch_on(mesh, [part])), own)
        losses.append(float(found["loss"]))
        ratios.append(float(found["rho_max"]))
    # Two programs, which round gradients differently; Adam divides by a gradient's own size, so the
    # smallest show it most. A step left out or in another order differs by whole steps.
    of_a_step = 1e-3 * KNOBS["learning_rate"]
    for got, want in zip(arrays(after.trained), arrays(state), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=of_a_step)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    tokens = sum(len(s.answer.tokens) for part in parts for s in part)
    assert float(metrics["update_tokens"]) == tokens and not metrics["skipped"]
    assert max(ratios) > 1.02 * min(ratios)  # so that a mean would show
    assert float(metrics["rho_max"]) == pytest.approx(max(ratios), rel=1e-4)


def test_reference_stays_until_it_is_due(one_device):
    mesh, _, declared, parts, before, after, _ = one_device
    for got, want in zip(arrays(after.reference), before, strict=True):
        np.testing.assert_array_equal(got, want)
    assert any((a != b).any() for a, b in zip(arrays(after.params), before, strict=True))
    *_, together, state, _ = made({"data": 1})
    renewed, _ = together(
        with_reference(declared, state, keep=True), batch_on(mesh, parts), knobs(renew=1.0)
    )
    for got, want in zip(arrays(renewed.reference), arrays(renewed.params), strict=True):
        np.testing.assert_array_equal(got, want)


def test_router_bias_and_mtp_rest(one_device):
    after = one_device[5]
    _, params, router = split(tiny_model(V3))
    for got, want in zip(arrays(after.router), arrays(router), strict=True):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(arrays(after.params["mtp"]), arrays(params["mtp"]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_eight_devices_make_the_same_updates(one_device):
    _, _, _, parts, _, want, metrics = one_device
    mesh, _, together, state, declared = made({"data": 2, "fsdp": 2, "expert": 2})
    layout = LAYOUT._replace(unit=8, micro_batch=8)
    batch = pack(parts, layout, "sequence", 8)
    batch |= {"old": batch["samp"], "ref": batch["samp"] - np.float32(0.2)}
    got, found = together(
        with_reference(declared, state, keep=True), place_all(batch, mesh), knobs()
    )
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-4)
    np.testing.assert_allclose(found["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    assert isinstance(got, PolicyState)
    moments = zip(arrays(got.optimizer), arrays(want.optimizer), strict=True)
    for one, other in moments:
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_seconds_are_reported_and_tokens_counted():
    def step(state, batch, knobs):
        return state + 1, {"update_tokens": jnp.float32(10)}

    class Plain:
        seconds = 2.0
        is_compiled = compile = staticmethod(lambda *arguments: True)
        __call__ = staticmethod(step)

    timed = Timed(Plain())
    state, metrics = timed(jnp.int32(1), {}, {})
    assert state == 2 and timed.seconds == 2.0 and timed.is_compiled({})
    rate = metrics["update_tokens_per_second"] * metrics["update_seconds"]
    np.testing.assert_allclose(rate, 10, rtol=1e-5)

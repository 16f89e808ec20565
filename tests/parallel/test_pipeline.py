"""Every schedule gives what the model gives in one piece: losses to the bit, gradients nearly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.parallel import pipeline
from dsjax.parallel.lockstep import IDLE, NONE, WEIGHTS, lock_step
from dsjax.parallel.mesh import make_mesh
from tests.closeness import EXACT, Level, assert_close
from tests.parallel import pipelines

pytestmark = pytest.mark.heavy

GRADIENTS = Level("GRADIENTS", 1e-6)
SIZES = {
    "gpipe": [(1, 2), (2, 3), (4, 6)],
    "1f1b": [(1, 1), (2, 3), (4, 6), (8, 5)],
    "interleaved": [(1, 3), (2, 4), (4, 8)],
    "zb1p": [(1, 3), (2, 3), (4, 6), (8, 5)],
    "dualpipe": [(2, 4), (4, 8), (8, 20)],
    "dualpipev": [(1, 2), (2, 4), (4, 11)],
}


def _assert_same(got, want):
    np.testing.assert_array_equal(got.reports["number"], want.reports["number"])
    np.testing.assert_array_equal(got.stage_reports["rows"], want.stage_reports["rows"])
    assert_close(got.reports["loss"], want.reports["loss"], EXACT, "losses")
    for name in ("stages", "outer"):
        got_part, want_part = getattr(got, name), getattr(want, name)
        for key in want_part:
            assert_close(got_part[key], want_part[key], GRADIENTS, f"{name} {key}")
    assert_close(got.stage_reports["penalty"], want.stage_reports["penalty"], GRADIENTS, "penalty")


def _check(name, ranks, microbatches):
    schedule = pipelines.build(name, ranks, microbatches)
    args = pipelines.arrays(schedule.n_stages, microbatches)
    _assert_same(pipelines.run(schedule, *args), pipelines.reference(pipelines.PIECES, *args))


@pytest.mark.parametrize("name", ["zb1p", "dualpipe"])
def test_pipeline_equals_the_whole(name):
    """Two that have all kinds of operations, and stages in their places and in others."""
    _check(name, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [(name, *size) for name, sizes in SIZES.items() for size in sizes],
)
def test_every_schedule_equals_the_whole(name, ranks, microbatches):
    _check(name, ranks, microbatches)


def _unlike(got, want):
    """1 - 2 x.y / (x.x + y.y), the measure of the public test of DualPipe."""
    x, y = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return 1 - 2 * (x * y).sum() / (x * x + y * y).sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
def test_public_test_of_dualpipe_passes(name, ranks):
    """20 micro-batches of 3 sequences of 256, width 512, a linear layer to 4 x 512 and back."""
    width, rows, microbatches = 512, 3 * 256, 20
    schedule = pipelines.build(name, ranks, microbatches)
    stages, _, inputs = pipelines.arrays(schedule.n_stages, microbatches, width, rows, 233)
    args = stages, {}, {"x": inputs["x"], "target": inputs["target"]}

    def leave(outer, y, inputs):
        loss = jnp.square(y - inputs["target"]).mean()
        return loss, {"loss": loss}

    pieces = pipeline.Pieces(
        lambda outer, inputs: inputs["x"],
        lambda p, x, inputs: (jax.nn.gelu(x @ p["w_up"]) @ p["w_down"], jnp.float32(0), {}),
        leave,
    )
    got = pipelines.run(schedule, *args, pieces=pieces)
    want = pipelines.reference(pieces, *args)
    np.testing.assert_array_equal(got.reports["loss"], want.reports["loss"])
    for key in stages:
        for stage in range(schedule.n_stages):
            assert _unlike(got.stages[key][stage], want.stages[key][stage]) < 1e-13


def _without_one_weight_gradient(table):
    kind, (tick, rank) = table.backward_kind.copy(), np.argwhere(table.backward_kind == WEIGHTS)[0]
    kind[tick, rank] = IDLE
    return table._replace(backward_kind=kind)


def _with_two_operations_swapped(table):
    work = table.forward._replace(microbatch=table.forward.microbatch.copy())
    first, second = np.flatnonzero(work.microbatch[:, 0] != NONE)[:2]
    work.microbatch[[first, second], 0] = work.microbatch[[second, first], 0]
    return table._replace(forward=work)


def _with_a_slot_too_few(table):
    return table._replace(activation_slots=table.activation_slots - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [_without_one_weight_gradient, _with_two_operations_swapped, _with_a_slot_too_few],
)
def test_mistake_in_the_table_is_noticed(mistake, monkeypatch):
    schedule = pipelines.build("zb1p", 2, 4)
    args = pipelines.arrays(schedule.n_stages, 4)
    monkeypatch.setattr(pipeline, "lock_step", lambda schedule: mistake(lock_step(schedule)))
    # Pieces of their own, so that nothing compiled before is taken.
    pieces = pipelines.PIECES._replace(enter=lambda *args: pipelines.enter(*args))
    got = pipelines.run(schedule, *args, pieces=pieces)
    with pytest.raises(AssertionError):
        _assert_same(got, pipelines.reference(pipelines.PIECES, *args))


@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
def test_program_does_not_grow_with_microbatches(name):
    def size(microbatches):
        schedule = pipelines.build(name, 4, microbatches)
        args = pipelines.arrays(schedule.n_stages, microbatches)
        with jax.set_mesh(make_mesh({"pipe": 4}, 4)):
            run = functools.partial(pipeline.run, schedule, pipelines.PIECES)
            return len(jax.jit(run).lower(*args).as_text().splitlines())

    assert size(8) == size(64)


def test_mesh_and_arrays_must_fit_the_schedule():
    schedule = pipelines.build("1f1b", 4, 6)
    with pytest.raises(ValueError, match=r"1f1b is for 4 ranks, the mesh has mesh\.pipe=2"):
        with jax.set_mesh(make_mesh({"pipe": 2}, 2)):
            pipeline.run(schedule, pipelines.PIECES, *pipelines.arrays(4, 6))
    with jax.set_mesh(make_mesh({"pipe": 4}, 4)):
        with pytest.raises(ValueError, match=r"4 stages, the arrays have \[3\]"):
            pipeline.run(schedule, pipelines.PIECES, *pipelines.arrays(3, 6))
        with pytest.raises(ValueError, match=r"6 micro-batches, the arrays have \[5\]"):
            pipeline.run(schedule, pipelines.PIECES, *pipelines.arrays(4, 5))

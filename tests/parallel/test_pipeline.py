"""Every schedule gives what the model gives in one piece: losses to the bit, gradients nearly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsjax.parallel import pipeline
from dsjax.parallel.lockstep import NONE, lock_step
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
    np.testing.assert_array_equal(got.layer_reports["rows"], want.layer_reports["rows"])
    assert_close(got.reports["loss"], want.reports["loss"], EXACT, "losses")
    for name in ("layers", "outer"):
        got_part, want_part = getattr(got, name), getattr(want, name)
        for key in want_part:
            assert_close(got_part[key], want_part[key], GRADIENTS, f"{name} {key}")
    assert_close(got.layer_reports["penalty"], want.layer_reports["penalty"], GRADIENTS, "penalty")


def _check(name, ranks, microbatches, more_layers=0):
    schedule = pipelines.build(name, ranks, microbatches)
    args = pipelines.arrays(schedule.n_stages + more_layers, microbatches)
    _assert_same(pipelines.run(schedule, *args), pipelines.reference(pipelines.PIECES, *args))


@pytest.mark.parametrize(("name", "more_layers"), [("1f1b", 1), ("dualpipe", 0)])
def test_pipeline_equals_the_whole(name, more_layers):
    """One with stages of unequal length, one whose ranks hold two copies of stages."""
    _check(name, 2, 4, more_layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [(name, *size) for name, sizes in SIZES.items() for size in sizes],
)
def test_every_schedule_equals_the_whole(name, ranks, microbatches):
    _check(name, ranks, microbatches)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SIZES if name not in ("gpipe", "zb1p")])
@pytest.mark.parametrize("more_layers", [1, 3])
def test_stages_of_unequal_length_equal_the_whole(name, more_layers):
    _check(name, 4, 8, more_layers)


@pytest.mark.slow
def test_arrays_that_no_rank_splits_are_moved_whole(monkeypatch):
    nowhere = functools.partial(jax.tree.map, lambda x: PartitionSpec(*(None,) * x.ndim))
    monkeypatch.setattr(pipelines, "specs", lambda *trees: tuple(map(nowhere, trees[:2])))
    _check("dualpipe", 4, 10, 1)


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
    layers, _, inputs = pipelines.arrays(schedule.n_stages, microbatches, width, rows, 233)
    args = layers, {}, {"x": inputs["x"], "target": inputs["target"]}

    def leave(outer, y, inputs):
        loss = jnp.square(y - inputs["target"]).mean()
        return loss, {"loss": loss}

    def stage(params, present, x, inputs):
        def layer(x, p):
            return jax.nn.gelu(x @ p["w_up"]) @ p["w_down"], {}

        x, report = jax.lax.scan(layer, x, params)
        return x, jnp.float32(0), report

    pieces = pipeline.Pieces(lambda outer, inputs: (inputs["x"], jnp.float32(0)), stage, leave)
    got = pipelines.run(schedule, *args, pieces=pieces)
    want = pipelines.reference(pieces, *args)
    np.testing.assert_array_equal(got.reports["loss"], want.reports["loss"])
    for key in layers:
        for layer in range(schedule.n_stages):
            assert _unlike(got.layers[key][layer], want.layers[key][layer]) < 1e-13


def _without_one_backward(table):
    microbatch = table.backward.microbatch.copy()
    tick, rank = np.argwhere(microbatch != NONE)[-1]
    microbatch[tick, rank] = NONE
    return table._replace(backward=table.backward._replace(microbatch=microbatch))


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
    [_without_one_backward, _with_two_operations_swapped, _with_a_slot_too_few],
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
        specs = pipelines.specs(*args[:2], 4)
        with jax.set_mesh(make_mesh({"pipe": 4}, 4)):
            run = functools.partial(pipeline.run, schedule, pipelines.PIECES, specs=specs)
            return len(jax.jit(run).lower(*args).as_text().splitlines())

    assert size(8) == size(64)


def test_shorter_stages_do_not_make_the_program_longer():
    def size(n_layers):
        schedule = pipelines.build("1f1b", 4, 8)
        args = pipelines.arrays(n_layers, 8)
        specs = pipelines.specs(*args[:2], 4)
        with jax.set_mesh(make_mesh({"pipe": 4}, 4)):
            run = functools.partial(pipeline.run, schedule, pipelines.PIECES, specs=specs)
            return len(jax.jit(run).lower(*args).as_text().splitlines())

    assert size(15) < 1.02 * size(5)


def test_mesh_and_arrays_must_fit_the_schedule():
    schedule = pipelines.build("1f1b", 4, 6)

    def run(ranks, n_layers, microbatches):
        args = pipelines.arrays(n_layers, microbatches)
        with jax.set_mesh(make_mesh({"pipe": ranks}, ranks)):
            pipeline.run(schedule, pipelines.PIECES, *args, pipelines.specs(*args[:2], ranks))

    with pytest.raises(ValueError, match=r"1f1b is for 4 ranks, the mesh has mesh\.pipe=2"):
        run(2, 4, 6)
    with pytest.raises(ValueError, match=r"has 4 stages, the arrays have \[3\] layers"):
        run(4, 3, 6)
    with pytest.raises(ValueError, match=r"6 micro-batches, the arrays have \[5\]"):
        run(4, 4, 5)

"""A step through a pipeline is the step without one, and what cannot be a pipeline is refused."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import settings
from dsjax.axes import AXES
from dsjax.checkpoint import store
from dsjax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    PrecisionConfig,
    TrainConfig,
)
from dsjax.parallel import schedules
from dsjax.parallel.mesh import describe_mesh, make_mesh
from dsjax.train import pipelined_step
from dsjax.train.loss import pretraining
from dsjax.train.optimizer import adamw
from dsjax.train.step import TrainState, abstract_state, declared_model, split, train_step
from tests.closeness import EXACT, Level, assert_close, relative_l2
from tests.model.tiny import TINY, tiny_model, tokens

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]

GRADIENTS = Level("GRADIENTS", 1e-6)
KNOBS = {"learning_rate": 1e-3, "mtp_weight": 0.3, "bias_update_speed": 1e-3}
BATCH, LENGTH = 16, 32
MOE = dataclasses.replace(TINY, n_layers=5, n_mtp=1)
UNEVEN = dataclasses.replace(TINY, n_layers=6, n_mtp=1)  # 5 MoE layers
# In rows of 32 tokens each query chooses 9 of those before it.
SPARSE = dataclasses.replace(MOE, index_n_heads=16, index_head_dim=12, index_topk=9)
DENSE = ModelConfig(
    vocab_size=96,
    dim=16,
    n_layers=4,
    n_dense_layers=4,
    n_heads=2,
    inter_dim=24,
    attention="gqa",
    tie_embed=True,
)


def _config(model, schedule="1f1b", microbatches=4, isolate=True, fp8="off", **train):
    return Config(
        name="x",
        model=model,
        data=DataConfig(sequence_length=LENGTH, isolate_documents=isolate),
        train=TrainConfig(batch_size=BATCH, **train),
        precision=PrecisionConfig(compute="float32", fp8=fp8),
        mesh=MeshConfig(schedule=schedule, microbatches=microbatches),
    )


def _abstract(config, mesh):
    declared = declared_model(config.model, config.precision)
    return abstract_state(declared, adamw(config.optim), mesh)


def _train_step(config):
    declared = declared_model(config.model, config.precision)
    objective = pretraining(config)
    return train_step(declared, adamw(config.optim), objective, schedule=config.mesh.schedule)


def _state(config, mesh):
    """A state with values from NumPy, laid out on the mesh."""
    _, params, router = split(tiny_model(config.model))
    made = TrainState(params, router, adamw(config.optim).init(params))
    return jax.tree.map(
        lambda x, a: jax.device_put(np.asarray(x), a.sharding), made, _abstract(config, mesh)
    )


def _batch(microbatches):
    rows = tokens(BATCH, LENGTH + 1)
    segments = jnp.where(jnp.arange(LENGTH + 1)[None] < 20, 1, 2) * jnp.ones_like(rows)
    segments = segments.at[0, 25:].set(0)  # some padding, in one micro-batch only
    batch = {"tokens": rows, "segment_ids": segments}
    return {name: x.reshape(microbatches, -1, LENGTH + 1) for name, x in batch.items()}


def _step(config, sizes):
    """One step; without optimisation losses would not be equal to the bit (see pipelines.py)."""
    mesh = make_mesh(sizes, math.prod(sizes.values()))
    step = jax.jit(_train_step(config), compiler_options={"xla_backend_optimization_level": 1})
    with jax.set_mesh(mesh):
        state = _state(config, mesh)
        knobs = {k: jnp.float32(v) for k, v in KNOBS.items()}
        return jax.device_get(step(state, _batch(config.mesh.microbatches), knobs))


def _assert_same_step(got, want):
    (got_state, got_metrics), (want_state, want_metrics) = got, want
    assert got_metrics.keys() == want_metrics.keys()
    for name, value in want_metrics.items():
        level = EXACT if name in ("loss", "mtp_loss") else GRADIENTS
        assert_close(got_metrics[name], value, level, name)
    # After one step the first moment is the clipped gradient times a number.
    for found, leaf in zip(
        *(jax.tree.leaves(state.optimizer["adam"].mu) for state in (got_state, want_state)),
        strict=True,
    ):
        assert relative_l2(found, leaf) < GRADIENTS.bound
    for found, leaf in zip(
        jax.tree.leaves(got_state.router), jax.tree.leaves(want_state.router), strict=True
    ):
        np.testing.assert_array_equal(found, leaf)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [4, 5])
def test_step_of_a_dense_model_equals_the_one_without_a_pipeline(layers):
    model = dataclasses.replace(DENSE, n_layers=layers, n_dense_layers=layers)
    config = _config(model, remat="none")
    _assert_same_step(_step(config, {"pipe": 2}), _step(config, {"data": 1}))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "dualpipe", "dualpipev"])
def test_step_of_layers_that_do_not_divide_equals_the_one_without_a_pipeline(schedule):
    _assert_same_step(_step(_config(UNEVEN, schedule), {"pipe": 2}), _uneven_step())


@pytest.mark.slow
def test_seven_layers_run_over_four_ranks():
    model = dataclasses.replace(TINY, n_layers=8, n_mtp=1)
    config = _config(model, "dualpipe", 8, remat="selective")
    _assert_same_step(_step(config, {"pipe": 4}), _step(config, {"data": 1}))


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"fp8": "on"}, {"remat": "full", "isolate": False}])
def test_variants_of_the_step_over_uneven_stages(other):
    config = _config(UNEVEN, **other)
    _assert_same_step(_step(config, {"pipe": 2}), _step(config, {"data": 1}))


@functools.cache
def _uneven_step():
    return _step(_config(UNEVEN), {"data": 1})


@functools.cache
def _whole_step():
    return _step(_config(MOE), {"data": 1})


@pytest.mark.slow
@pytest.mark.parametrize("schedule", schedules.NAMES)
def test_step_equals_the_one_without_a_pipeline(schedule):
    _assert_same_step(_step(_config(MOE, schedule), {"pipe": 2}), _whole_step())


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"expert": 2}, {"fsdp": 2, "tensor": 2}, {"context": 2}])
def test_step_equals_the_one_on_the_same_devices_without_stages(other):
    # `tests/train/test_step.py` compares such a mesh without stages with one device.
    got = _step(_config(MOE, "dualpipe"), {"pipe": 2, **other})
    _assert_same_step(got, _step(_config(MOE), other))


@pytest.mark.slow
def test_indexers_learn_in_stages_what_they_do_without():
    got = _step(_config(SPARSE), {"pipe": 2})
    assert got[1]["index_loss"] > 0
    _assert_same_step(got, _step(_config(SPARSE), {"data": 1}))


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.combinations(AXES[1:], 2)), ids=" x ".join)
def test_stages_compile_beside_any_two_axes(pair):
    """XLA aborts where it cannot split a lookup over two axes (`vocabulary_parallel.py`)."""
    config, sizes = _config(MOE, "gpipe"), dict.fromkeys(("pipe", *pair), 2)
    mesh = make_mesh(sizes, 8)
    with jax.set_mesh(mesh):
        knobs = {name: jnp.float32(value) for name, value in KNOBS.items()}
        jax.jit(_train_step(config)).lower(_abstract(config, mesh), _batch(4), knobs).compile()


@pytest.mark.slow
def test_program_does_not_grow_with_layers():
    def size(n_layers):
        config = _config(dataclasses.replace(MOE, n_layers=n_layers))
        mesh = make_mesh({"pipe": 2}, 2)
        with jax.set_mesh(mesh):
            state, knobs = (
                _abstract(config, mesh),
                {k: jnp.float32(v) for k, v in KNOBS.items()},
            )
            lowered = jax.jit(_train_step(config)).lower(state, _batch(4), knobs)
        return len(lowered.as_text().splitlines())

    # A few lines differ where a dimension is as long as another.
    assert size(17) < 1.01 * size(5)


def test_checkpoint_of_a_pipeline_is_that_of_any_mesh(tmp_path):
    config = _config(UNEVEN)
    two, one = make_mesh({"pipe": 2}, 2), make_mesh({"data": 1}, 1)
    state = _state(config, two)
    w_up = state.params["moe_layers"]["ffn"]["experts"]["w_up"][...]
    assert {shard.data.size for shard in w_up.addressable_shards} == {w_up.size // 2}
    kept = store.Store(tmp_path, keep=1)
    kept.save(1, state, {})
    kept.close()
    restored = store.restore(tmp_path, 1, _abstract(config, one))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {1}
    for found, leaf in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(found, leaf)


@pytest.mark.parametrize(
    ("schedule", "pipe", "microbatches", "message"),
    [
        ("1f1b", 8, 16, r"4 MoE layers are fewer than the 8 stages .* use mesh\.pipe of at most 4"),
        ("dualpipev", 4, 16, r"than the 8 stages of mesh\.schedule=dualpipev .*pipe of at most 2"),
        ("1f1b", 4, 2, r"2 micro-batches cannot keep .* mesh\.pipe=4 busy; .* to 8 or more"),
        ("dualpipe", 4, 4, r"mesh\.schedule=dualpipe on mesh\.pipe=4 with 4 micro-batches .* 2 x"),
    ],
)
def test_misfits_are_refused(schedule, pipe, microbatches, message):
    config = _config(MOE, schedule, microbatches)
    with pytest.raises(ValueError, match=message):
        pipelined_step.check(config, make_mesh({"pipe": pipe}, pipe))


@pytest.mark.parametrize("pipe", [4, 8, 16])
@pytest.mark.parametrize("schedule", schedules.NAMES)
def test_v3_may_have_as_many_stages_as_in_the_paper_and_fewer(schedule, pipe):
    config = settings.load_config(ROOT / "configs/v3_671b.py")
    sizes = {"fsdp": 1, "expert": 64, "pipe": pipe}
    changes = ["train.micro_batch_size=64", f"mesh.schedule={schedule}"]
    changes += [f"mesh.{axis}={size}" for axis, size in sizes.items()]
    config = settings.override(config, changes)
    mesh = describe_mesh(sizes)
    pipelined_step.check(config, mesh)
    _abstract(config, mesh)  # every array divides over the devices


def test_every_size_of_a_growing_batch_is_checked():
    train = {"batch_size_start": 4, "batch_ramp_fraction": 0.5, "micro_batch_size": 4, "steps": 100}
    config = _config(MOE, microbatches=4, **train)
    with pytest.raises(ValueError, match=r"1 micro-batches cannot keep"):
        pipelined_step.check(config, make_mesh({"pipe": 2}, 2))
    pipelined_step.check(config, make_mesh({"data": 1}, 1))

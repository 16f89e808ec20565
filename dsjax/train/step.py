"""One optimizer step: gradients over the micro-batches, AdamW, and the routers' bias update.

The step is a pure function of state, batch and knobs. What it minimises is an argument
(`dsjax.train.objective`), so every kind of training runs this one step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsjax.config import ModelConfig, PrecisionConfig
from dsjax.display import Display
from dsjax.kernels.target import Target
from dsjax.model.balance import max_violation, update_bias
from dsjax.model.layers import RouterState
from dsjax.model.parameters import initialize, shardings
from dsjax.model.transformer import Transformer
from dsjax.parallel.compilation import Compiled, compiler_options
from dsjax.parallel.pipeline import PIPE
from dsjax.parallel.sharding import constrain, optimizer_spec
from dsjax.precision.policy import Policy
from dsjax.train import pipelined_step
from dsjax.train.objective import (
    Batch,
    Knobs,
    Metrics,
    Objective,
    Prepared,
    Totals,
    read_batch,
    read_experts,
    replacing,
    replayed,
    sum_over_micro_batches,
    weigh,
)
from dsjax.train.optimizer import EMA, Optimizer, average_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Every array that a step reads and writes."""

    params: nnx.State  # float32 masters
    router: nnx.State  # selection biases, float32
    optimizer: Any


def declared_model(
    model: ModelConfig, precision: PrecisionConfig, target: Target | None = None
) -> Transformer:
    """Declares the model of a config, without values.

    Args:
      target: the machine to compile for; None: JAX's own devices.
    """
    fp8 = precision.fp8_scale if precision.fp8 == "on" else None
    policy = Policy(jnp.dtype(precision.compute), target or Target.here(), fp8)
    return Transformer(model, policy)


def split(model: Transformer) -> tuple[Any, nnx.State, nnx.State]:
    """Splits a model into its structure, its parameters and its router state."""
    structure, params, router = nnx.split(model, nnx.Param, RouterState)
    return structure, params, router


def _make_state(declared: Transformer, optimizer: Optimizer, key: jax.Array) -> TrainState:
    _, params, router = split(initialize(declared, key))
    return TrainState(params, router, optimizer.init(params))


def abstract_state(
    declared: Transformer, optimizer: Optimizer, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Returns the state's shapes, dtypes and shardings: what to restore into or to compile for.

    Raises:
      ValueError: a parameter does not divide over the mesh.
    """
    shapes = jax.eval_shape(lambda key: _make_state(declared, optimizer, key), jax.random.key(0))
    placement = TrainState(
        shardings(shapes.params, mesh),
        shardings(shapes.router, mesh),
        shardings(shapes.optimizer, mesh, optimizer_spec),
    )
    if (average := average_of(shapes.optimizer)) is not None:
        placement.optimizer[EMA] = shardings(average, mesh)  # as the weights that it stands for
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        placement,
    )


def initial_state(declared: Transformer, optimizer: Optimizer, mesh: Mesh, seed: int) -> TrainState:
    """Makes the state before the first step, each device its own part. Values depend on the seed
    alone, not on the mesh.
    """
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(declared, optimizer, mesh))
    # This program runs once; on a CPU, optimising a random generator per parameter takes longer
    # than it saves.
    options = {"xla_backend_optimization_level": 0} if Target.here().kind == "cpu" else None
    make = jax.jit(
        lambda key: _make_state(declared, optimizer, key),
        out_shardings=placement,
        compiler_options=options,
    )
    return make(jax.random.key(seed))


def scored_params(state: Any) -> nnx.State:
    """Returns the weights that are scored and written: their averages, if the run keeps any
    (`optim.ema`), and where none is kept, because nothing moves, the weights.

    Args:
      state: of a run, a `TrainState` or what has its attributes.
    """
    average = average_of(state.optimizer)
    return state.params if average is None else nnx.merge_state(state.params, average)


def restored_model(declared: Transformer, state: TrainState) -> Transformer:
    """Returns the declared model with the values of a state that are scored and written."""
    structure, *_ = split(declared)
    return nnx.merge(structure, scored_params(state), state.router)


def train_step(
    declared: Transformer, optimizer: Optimizer, objective: Objective, *, schedule: str = "1f1b"
) -> Callable[[TrainState, Batch, Knobs], tuple[TrainState, Metrics]]:
    """Builds the step: (state, batch, knobs) -> (state, metrics). Jit it with the state donated.

    Knobs are `learning_rate` and `bias_update_speed`, float32 scalars, and what the objective asks
    for. Metrics are those of the objective and of the step: scalars, except `expert_load` [MoE
    layers and MTP modules, E], each expert's share of its layer's assignments. If the loss or the
    gradient is not finite, the state is returned unchanged and `skipped` is true.

    Args:
      declared: the model without values.
      schedule: the pipeline's, used if the mesh has a pipeline.
    """

    def step(state: TrainState, batch: Batch, knobs: Knobs) -> tuple[TrainState, Metrics]:
        inputs, targets = read_batch(objective, declared, batch)
        weights, experts = objective.weights(targets, knobs), read_experts(batch)
        prepared = Prepared(inputs, targets, weights, experts)
        pipelined = jax.sharding.get_abstract_mesh().shape.get(PIPE, 1) > 1
        gradients = partial(pipelined_step.gradients, schedule_name=schedule)
        trained, frozen = optimizer.split(state.params)
        fixed = nnx.merge_state(frozen, state.router)
        grads, totals = (gradients if pipelined else _gradients)(
            declared, objective, trained, fixed, prepared, knobs
        )
        metrics = objective.metrics(totals.sums)
        fine = jnp.isfinite(metrics["loss"])
        params, optimizer_state, grad_norm = optimizer.update(
            grads, state.optimizer, state.params, knobs["learning_rate"], fine
        )
        fine &= jnp.isfinite(grad_norm)
        metrics |= _metrics(totals, grad_norm) | {"skipped": ~fine}
        router = state.router
        if totals.counts_LE is not None and declared.config.router_bias:
            moved = _update_router(
                router, totals.counts_LE, knobs["bias_update_speed"], declared.config.n_moe_layers
            )
            router = jax.tree.map(lambda new, old: jnp.where(fine, new, old), moved, router)
        return TrainState(params, router, optimizer_state), metrics

    return step


def _gradients(
    declared: Transformer,
    objective: Objective,
    trained: nnx.State,
    fixed: nnx.State,
    batch: Prepared,
    knobs: Knobs,
) -> tuple[nnx.State, Totals]:
    structure, *_ = split(declared)

    forward = objective.forward

    def weighted(trained: nnx.State, micro_batch: Prepared):
        model = nnx.merge(structure, trained, fixed)
        hidden = model.forward(
            micro_batch.inputs,
            balance=forward.balance,
            remat=forward.remat,
            embeddings=replacing(objective, model, micro_batch.targets),
            experts_LBTK=replayed(micro_batch.experts),
            lesson=forward.lesson,
            inner=forward.inner,
        )
        return weigh(objective, model, hidden, micro_batch, knobs)

    def micro_step(micro_batch: Prepared) -> tuple[nnx.State, Totals]:
        (_, totals), grads = jax.value_and_grad(weighted, has_aux=True)(trained, micro_batch)
        return grads, totals

    return sum_over_micro_batches(micro_step, batch)


def _metrics(totals: Totals, grad_norm: jax.Array) -> Metrics:
    """Returns the metrics that every step reports, whatever its objective."""
    metrics = {
        "balance_loss": totals.balance,
        "grad_norm": grad_norm,
        "dropped_tokens": totals.dropped_tokens,
        "max_violation": jnp.float32(0),
    }
    if totals.index_loss is not None:
        metrics["index_loss"] = totals.index_loss
    if totals.counts_LE is not None:
        counts_LE = totals.counts_LE.astype(jnp.float32)
        metrics["max_violation"] = max_violation(totals.counts_LE).mean()
        load_LE = counts_LE / jnp.maximum(counts_LE.sum(axis=-1, keepdims=True), 1.0)
        # Replicated, so that every process can read all of it.
        metrics["expert_load"] = constrain(load_LE, "norm", "norm")
    return metrics


def _update_router(
    router: nnx.State, counts_LE: jax.Array, speed: jax.Array, n_main: int
) -> nnx.State:
    """Updates the bias of every layer that ran.

    Args:
      counts_LE: the `n_main` layers of the main stack first, then the MTP modules, if they ran.
    """
    stacks = {"moe_layers": counts_LE[:n_main], "mtp": counts_LE[n_main:]}

    def moved(path: Any, bias_LE: jax.Array) -> jax.Array:
        counts_LE = stacks[path[0].key]
        return update_bias(bias_LE, counts_LE, speed) if len(counts_LE) else bias_LE

    return jax.tree_util.tree_map_with_path(moved, router)


def compile_step(
    step: Callable[[Any, Batch, Knobs], tuple[Any, Metrics]],
    abstract: Any,
    mesh: Mesh,
    *,
    what: str = "the training step",
    display: Display | None = None,
) -> Compiled:
    """Jits a step for a mesh: the state is donated and stays where it is, and every process can
    read the metrics.

    Args:
      abstract: the state's shapes and shardings.
      what, display: see `Compiled`.
    """
    # Without out_shardings the compiler may place the new state where the next step cannot take it.
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    everywhere = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(placement, everywhere),
        compiler_options=compiler_options(Target.here(), mesh.size),
    )
    return Compiled(jitted, mesh, what=what, display=display)

"""One optimizer step: gradients over the micro-batches, AdamW, and the router's bias update.

The step is a pure function of state, batch and the knobs that a schedule turns. The batch may come
as several micro-batches; their sums are added before anything is divided, so the result is that of
the whole batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dsjax.config import Config
from dsjax.model.balance import max_violation, update_bias
from dsjax.model.layers import RouterState
from dsjax.model.parameters import initialize, shardings
from dsjax.model.transformer import Transformer
from dsjax.parallel.sharding import constrain
from dsjax.precision.policy import Policy
from dsjax.train import optimizer
from dsjax.train.loss import Losses, losses, target_mask

Batch = dict[str, jax.Array]  # tokens and segment_ids, int32 [micro-batches, sequences, T + 1]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All arrays that a step reads and writes."""

    params: nnx.State  # float32 masters
    router: nnx.State  # selection biases, float32
    optimizer: Any


def declared_model(config: Config) -> Transformer:
    """The config's model without values."""
    precision = config.precision
    fp8 = precision.fp8_scale if precision.fp8 == "on" else None
    return Transformer(config.model, Policy(jnp.dtype(precision.compute), fp8=fp8))


def split(model: Transformer) -> tuple[Any, nnx.State, nnx.State]:
    """Takes a model apart into its structure, its trained parameters and its router state."""
    structure, params, router = nnx.split(model, nnx.Param, RouterState)
    return structure, params, router


def _make_state(model: Transformer, config: Config, key: jax.Array) -> TrainState:
    _, params, router = split(initialize(model, key))
    return TrainState(params, router, optimizer.adamw(config.optim).init(params))


def abstract_state(config: Config, mesh: Mesh | AbstractMesh) -> TrainState:
    """The state's shapes, dtypes and shardings, to restore a checkpoint into or to compile for.

    Raises:
      ValueError: parameters that do not divide over the mesh.
    """
    model = declared_model(config)
    shapes = jax.eval_shape(lambda key: _make_state(model, config, key), jax.random.key(0))
    placement = TrainState(
        shardings(shapes.params, mesh),
        shardings(shapes.router, mesh),
        shardings(shapes.optimizer, mesh, optimizer_state=True),
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        placement,
    )


def initial_state(config: Config, mesh: Mesh) -> TrainState:
    """Makes the state of step 0, each device its own part; values depend on `train.seed` alone."""
    model = declared_model(config)
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    # It runs once, and an optimised random generator per parameter takes the CPU's compiler longer
    # than it saves.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    make = jax.jit(
        lambda key: _make_state(model, config, key),
        out_shardings=placement,
        compiler_options=options,
    )
    return make(jax.random.key(config.train.seed))


def restored_model(config: Config, state: TrainState) -> Transformer:
    """The model with a state's values."""
    structure, *_ = split(declared_model(config))
    return nnx.merge(structure, state.params, state.router)


def train_step(
    config: Config,
) -> Callable[[TrainState, Batch, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Builds the step: (state, batch, knobs) -> (state, metrics), to be jitted with the state
    donated.

    Knobs are float32 scalars: `learning_rate`, `mtp_weight`, `bias_update_speed`. Metrics are
    scalars, but for `expert_load` [MoE layers and MTP modules, E], each expert's share of its
    layer's assignments. Where loss or gradient is not finite, the state comes back as it was, and
    `skipped` is true.
    """
    structure, *_ = split(declared_model(config))
    adamw = optimizer.adamw(config.optim)
    mtp_depths = max(config.model.n_mtp, 1)

    def weighted(params, router, micro_batch, mtp_weight, n_targets):
        """A micro-batch's part of the whole batch's loss."""
        sums = losses(nnx.merge(structure, params, router), micro_batch, config)
        total = sums.main + mtp_weight / mtp_depths * sums.mtp + sums.balance * sums.main_targets
        return total / n_targets, sums

    gradient = jax.value_and_grad(weighted, has_aux=True)

    def step(
        state: TrainState, batch: Batch, knobs: dict[str, jax.Array]
    ) -> tuple[TrainState, Metrics]:
        n_targets = _count_targets(batch, config)

        def micro_step(micro_batch: Batch) -> tuple[nnx.State, Losses]:
            (_, sums), grads = gradient(
                state.params, state.router, micro_batch, knobs["mtp_weight"], n_targets
            )
            return grads, sums._replace(balance=sums.balance * sums.main_targets / n_targets)

        grads, sums = _sum_over_micro_batches(micro_step, batch)
        params, optimizer_state, grad_norm = adamw.update(
            grads, state.optimizer, state.params, knobs["learning_rate"]
        )
        router = state.router
        metrics = _metrics(sums, grad_norm)
        if sums.counts_LE is not None and config.model.router_bias:
            router = _update_router(router, sums.counts_LE, knobs["bias_update_speed"], config)
        updated = TrainState(params, router, optimizer_state)
        fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        metrics["skipped"] = ~fine
        return jax.tree.map(lambda new, old: jnp.where(fine, new, old), updated, state), metrics

    return step


def _count_targets(batch: Batch, config: Config) -> jax.Array:
    """Targets of the main model in the whole batch."""
    segment_ids = batch["segment_ids"]
    rows = segment_ids.reshape(-1, segment_ids.shape[-1])
    return jnp.maximum(target_mask(rows, 1, config.data.isolate_documents).sum(), 1).astype(
        jnp.float32
    )


def _sum_over_micro_batches(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """Adds up a function's values over the leading dimension, one micro-batch at a time."""
    first = jax.tree.map(lambda x: x[0], batch)
    if batch["tokens"].shape[0] == 1:
        return function(first)
    zeros = jax.tree.map(
        lambda value: jnp.zeros(value.shape, value.dtype), jax.eval_shape(function, first)
    )
    return jax.lax.scan(
        lambda total, micro_batch: (jax.tree.map(jnp.add, total, function(micro_batch)), None),
        zeros,
        batch,
    )[0]


def _metrics(sums: Losses, grad_norm: jax.Array) -> Metrics:
    metrics = {
        "loss": sums.main / jnp.maximum(sums.main_targets, 1.0),
        "mtp_loss": sums.mtp / jnp.maximum(sums.mtp_targets, 1.0),
        "balance_loss": sums.balance,
        "grad_norm": grad_norm,
        "dropped_tokens": sums.dropped_tokens,
        "max_violation": jnp.float32(0),
    }
    if sums.counts_LE is not None:
        counts_LE = sums.counts_LE.astype(jnp.float32)
        metrics["max_violation"] = max_violation(sums.counts_LE).mean()
        load_LE = counts_LE / jnp.maximum(counts_LE.sum(axis=-1, keepdims=True), 1.0)
        # Whole on every device, so that every process can read it.
        metrics["expert_load"] = constrain(load_LE, "norm", "norm")
    return metrics


def _update_router(
    router: nnx.State, counts_LE: jax.Array, speed: jax.Array, config: Config
) -> nnx.State:
    """Moves every layer's bias; counts list the main stack's layers first, then the MTP modules."""
    n_main = config.model.n_moe_layers
    stacks = {"moe_layers": counts_LE[:n_main], "mtp": counts_LE[n_main:]}
    return jax.tree_util.tree_map_with_path(
        lambda path, bias_LE: update_bias(bias_LE, stacks[path[0].key], speed), router
    )

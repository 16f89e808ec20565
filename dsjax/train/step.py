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
from dsjax.kernels.target import Target
from dsjax.model.balance import max_violation, update_bias
from dsjax.model.layers import RouterState
from dsjax.model.parameters import initialize, shardings
from dsjax.model.transformer import Transformer
from dsjax.parallel.pipeline import PIPE
from dsjax.parallel.sharding import constrain
from dsjax.precision.policy import Policy
from dsjax.train import optimizer, pipelined_step
from dsjax.train.loss import Losses, losses, sum_over_micro_batches, target_mask

Batch = dict[str, jax.Array]  # tokens and segment_ids, int32 [micro-batches, sequences, T + 1]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All arrays that a step reads and writes."""

    params: nnx.State  # float32 masters
    router: nnx.State  # selection biases, float32
    optimizer: Any


def declared_model(config: Config, target: Target | None = None) -> Transformer:
    """The config's model without values.

    Args:
      target: the machine it is compiled for; None: JAX's own devices.
    """
    precision = config.precision
    fp8 = precision.fp8_scale if precision.fp8 == "on" else None
    policy = Policy(jnp.dtype(precision.compute), target or Target.here(), fp8)
    return Transformer(config.model, policy)


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
    options = {"xla_backend_optimization_level": 0} if Target.here().kind == "cpu" else None
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
    config: Config, target: Target | None = None
) -> Callable[[TrainState, Batch, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Builds the step: (state, batch, knobs) -> (state, metrics), to be jitted with the state
    donated.

    Knobs are float32 scalars: `learning_rate`, `mtp_weight`, `bias_update_speed`. Metrics are
    scalars, but for `expert_load` [MoE layers and MTP modules, E], each expert's share of its
    layer's assignments. Where loss or gradient is not finite, the state comes back as it was, and
    `skipped` is true.

    Args:
      target: the machine the step is compiled for; None: JAX's own devices.
    """
    model = declared_model(config, target)
    adamw = optimizer.adamw(config.optim)

    def step(
        state: TrainState, batch: Batch, knobs: dict[str, jax.Array]
    ) -> tuple[TrainState, Metrics]:
        weights = _loss_weights(batch, knobs["mtp_weight"], config)
        pipelined = jax.sharding.get_abstract_mesh().shape.get(PIPE, 1) > 1
        gradients = pipelined_step.gradients if pipelined else _gradients
        grads, sums = gradients(model, config, state.params, state.router, batch, weights)
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
        with jax.named_scope("optimizer"):
            state = jax.tree.map(lambda new, old: jnp.where(fine, new, old), updated, state)
        return state, metrics

    return step


def _loss_weights(batch: Batch, mtp_weight: jax.Array, config: Config) -> dict[str, jax.Array]:
    """What the losses of each micro-batch count in the batch's: float32 [micro-batches]. Those of
    targets are sums, those of balance averages over the micro-batch.
    """
    n_micro_batches, rows, _ = (segment_ids := batch["segment_ids"]).shape
    mask = target_mask(
        segment_ids.reshape(n_micro_batches * rows, -1), 1, config.data.isolate_documents
    )
    targets = mask.reshape(n_micro_batches, -1).sum(axis=1).astype(jnp.float32)
    n_targets = jnp.maximum(targets.sum(), 1.0)
    main = jnp.broadcast_to(1.0 / n_targets, targets.shape)
    mtp_depths = max(config.model.n_mtp, 1)
    return {"main": main, "mtp": mtp_weight / mtp_depths * main, "balance": targets / n_targets}


def _gradients(
    declared: Transformer,
    config: Config,
    params: nnx.State,
    router: nnx.State,
    batch: Batch,
    weights: dict[str, jax.Array],
) -> tuple[nnx.State, Losses]:
    """The gradients, and the losses with the weighted sum of the balance losses."""
    structure, *_ = split(declared)

    def weighted(params: nnx.State, micro_batch: Batch) -> tuple[jax.Array, Losses]:
        sums = losses(nnx.merge(structure, params, router), micro_batch, config)
        sums = sums._replace(balance=sums.balance * micro_batch["balance"])
        total = sums.main * micro_batch["main"] + sums.mtp * micro_batch["mtp"] + sums.balance
        return total, sums

    def micro_step(micro_batch: Batch) -> tuple[nnx.State, Losses]:
        (_, sums), grads = jax.value_and_grad(weighted, has_aux=True)(params, micro_batch)
        return grads, sums

    return sum_over_micro_batches(micro_step, {**batch, **weights})


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

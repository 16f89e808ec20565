"""A training step's gradients with the layers in a pipeline (`mesh.pipe`).

The body of the model is cut into stages: its MoE layers or, in a dense model, its dense ones. They
need not divide; V3's 58 over 16 ranks make ten stages of four layers and six of three. What is at
the ends, embedding and dense prefix, final norm, output head and MTP modules, is divided over all
ranks by micro-batch (`dsjax.parallel.pipeline`).

Departure: V3 (arXiv:2412.19437, section 3.2) gives the first and the last rank fewer layers, as
those two also compute the ends. Ranks in step would all wait for them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dsjax.config import Config, ModelConfig
from dsjax.config.posttraining import PostTraining
from dsjax.model.block import run_layers
from dsjax.model.layers import RouterState
from dsjax.model.parameters import shardings
from dsjax.model.transformer import Transformer
from dsjax.parallel import pipeline, schedules
from dsjax.parallel.timetable import Schedule
from dsjax.train.hyperparameters import batch_stages
from dsjax.train.objective import (
    Knobs,
    Objective,
    Prepared,
    Totals,
    sum_over_micro_batches,
    weigh,
)

Tree = Any


def check(config: Config | PostTraining, mesh: Mesh | AbstractMesh) -> None:
    """Refuses what cannot be pipelined over the mesh.

    Raises:
      ValueError: fewer layers than stages, or a number of micro-batches, at some size of the batch,
        that is too small for the schedule or does not suit it.
    """
    if mesh.shape[pipeline.PIPE] > 1:
        assert config.model is not None, "the checkpoint's shape is known by now"
        for _, sequences in batch_stages(config.train):
            _schedule(
                config.model, config.mesh.schedule, mesh, sequences // config.micro_batch_size
            )


def _schedule(
    model: ModelConfig, name: str, mesh: Mesh | AbstractMesh, microbatches: int
) -> Schedule:
    ranks = mesh.shape[pipeline.PIPE]
    stages = ranks * schedules.stages_per_rank(name)
    layers = model.n_moe_layers or model.n_layers
    if layers < stages:
        raise ValueError(
            f"the model's {layers} {'MoE' if model.n_moe_layers else 'dense'} layers are fewer "
            f"than the {stages} stages of mesh.schedule={name} on mesh.pipe={ranks}; use mesh.pipe "
            f"of at most {layers * ranks // stages}"
        )
    if microbatches < ranks:
        raise ValueError(
            f"{microbatches} micro-batches cannot keep the ranks of mesh.pipe={ranks} busy; set "
            f"mesh.microbatches to {2 * ranks} or more"
        )
    try:
        return schedules.build(name, stages, microbatches)
    except ValueError as error:
        raise ValueError(
            f"mesh.schedule={name} on mesh.pipe={ranks} with {microbatches} micro-batches "
            f"(mesh.microbatches): {error}"
        ) from None


def gradients(
    declared: Transformer,
    objective: Objective,
    trained: nnx.State,
    fixed: nnx.State,
    batch: Prepared,
    knobs: Knobs,
    schedule_name: str,
) -> tuple[nnx.State, Totals]:
    """Computes what the step without a pipeline sums up over the micro-batches one by one.

    Args:
      declared: the model without values.
      trained: the parameters whose gradients are returned.
      fixed: all other values of the model.
      batch: each array [micro-batches, ...].
      schedule_name: one of `schedules.NAMES`.

    Raises:
      ValueError: the batch has expert choices to replay, which stages cannot.
    """
    assert objective.embeddings is None, "only the first stage embeds"
    if batch.experts is not None:
        raise ValueError(
            "a pipeline cannot replay expert choices (the batch's `experts`): its layers read what "
            "comes from the stage before and no more; train with mesh.pipe=1, or without them"
        )
    name, mesh = declared.body, jax.sharding.get_abstract_mesh()
    schedule = _schedule(declared.config, schedule_name, mesh, len(batch.inputs.tokens))
    body, outer = zip(*(_cut(state, name) for state in (trained, fixed)), strict=True)
    pieces = _pieces(declared, objective, knobs)
    specs = jax.tree.map(lambda placed: placed.spec, shardings((body, outer), mesh))
    found = pipeline.run(schedule, pieces, body, outer, batch, specs)
    totals = sum_over_micro_batches(lambda report: report, found.reports)
    layers = found.layer_reports
    if "counts" in layers:
        counts_LE = layers["counts"]
        if totals.counts_LE is not None:
            counts_LE = jnp.concatenate([counts_LE, totals.counts_LE])
        totals = totals._replace(
            balance=totals.balance + layers["balance"].sum(),
            dropped_tokens=totals.dropped_tokens + layers["dropped_tokens"].sum(),
            counts_LE=counts_LE,
        )
    if "index" in layers:
        modules = jnp.float32(0) if totals.index_loss is None else totals.index_loss
        totals = totals._replace(index_loss=found.entered + layers["index"].sum() + modules)
    return nnx.merge_state(found.outer[0], found.layers[0]), totals


def _cut(state: nnx.State, body: str) -> tuple[nnx.State, nnx.State]:
    """Returns the body's part and the rest."""
    inside, outside = nnx.split_state(state, lambda path, _: path[0] == body, ...)
    return inside, outside


def _pieces(declared: Transformer, objective: Objective, knobs: Knobs) -> pipeline.Pieces:
    structure, *whole = nnx.split(declared, nnx.Param, RouterState)
    placeholders = [_cut(state, declared.body)[0] for state in whole]
    forward = objective.forward
    balance, lesson = forward.balance, forward.lesson

    def ends(outer: Tree) -> Transformer:
        """The model without values in its body."""
        return _merge(structure, outer, placeholders)

    def enter(outer: Tree, batch: Prepared) -> tuple[jax.Array, jax.Array]:
        model = ends(outer)
        context = model.context(batch.inputs, forward.remat)
        x_BTD, index_loss_L = model.enter(batch.inputs, context, lesson=lesson)
        if index_loss_L is None:
            return x_BTD, jnp.float32(0)
        return x_BTD, index_loss_L.sum() * batch.weights.balance

    def stage(
        body: Tree, present_L: jax.Array | None, x_BTD: jax.Array, batch: Prepared
    ) -> tuple[jax.Array, jax.Array, Tree]:
        model = _merge(structure, body, [_cut(state, declared.body)[1] for state in whole])
        layers = getattr(model, declared.body)
        context = model.context(batch.inputs, forward.remat)
        x_BTD, (routing, index_loss_L), _ = run_layers(
            layers, x_BTD, context, balance, present_L=present_L, lesson=lesson
        )
        weighted, report = jnp.float32(0), {}
        if routing is not None:
            report["balance"] = routing.balance_loss * batch.weights.balance
            weighted += report["balance"].sum()
            report |= {"counts": routing.counts_E, "dropped_tokens": routing.dropped_tokens}
        if index_loss_L is not None:
            report["index"] = index_loss_L * batch.weights.balance
            weighted += report["index"].sum()
        return x_BTD, weighted, report

    def leave(outer: Tree, x_BTD: jax.Array, batch: Prepared) -> tuple[jax.Array, Totals]:
        model = ends(outer)
        context = model.context(batch.inputs, forward.remat)
        hidden = model.leave(x_BTD, batch.inputs, context, balance=balance, lesson=lesson)
        return weigh(objective, model, hidden, batch, knobs)

    return pipeline.Pieces(enter, stage, leave)


def _merge(structure: Any, some: Tree, others: Tree) -> Transformer:
    return nnx.merge(structure, *map(nnx.merge_state, some, others))

"""The programs of post-training that run on a slice, with the shapes and shardings of their
arguments.

A checkpoint's tokens are packed into rows whose number depends on the data. What is planned is the
smallest batch there is: as many rows as a batch is a multiple of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from dsjax.config.finetuning import FineTuning
from dsjax.config.preference import Preference
from dsjax.config.reinforcement import Reinforcement
from dsjax.kernels.target import Target
from dsjax.model import token_sets
from dsjax.parallel.context import check_length
from dsjax.parallel.mesh import describe_mesh, resolve
from dsjax.parallel.sharding import generation_spec, stored_spec
from dsjax.plan.programs import Program, decoding, number, shard_bytes
from dsjax.posttrain.initial import all_but_mtp
from dsjax.posttrain.policy import log_probabilities, policy_objective
from dsjax.posttrain.preference import preference
from dsjax.posttrain.reward_model import RewardModel, trains
from dsjax.posttrain.rollout import generating_shapes
from dsjax.posttrain.supervised import supervised
from dsjax.posttrain.updates import RENEW, PolicyState, all_minibatches, with_reference
from dsjax.train import hyperparameters, pipelined_step
from dsjax.train.batches import batch_sharding
from dsjax.train.optimizer import adamw
from dsjax.train.step import abstract_state, declared_model, train_step

AnyMesh = Mesh | AbstractMesh


def finetune(config: FineTuning, mesh: AnyMesh, target: Target) -> Program:
    """Builds one step of fine-tuning on conversations.

    Raises:
      ValueError: parameters or batch do not divide over the mesh, or the config learns from a
        teacher or trains chosen experts, which are not planned.
    """
    for key, value, plain, remedy in (
        ("distill.kind", config.distill.kind, "samples", "samples distill.teacher="),
        ("esft.score", config.esft.score, "off", "off"),
    ):
        if value != plain:
            raise ValueError(
                f"{key}={value} depends on a teacher or on the task's text, which a plan does not "
                f"read; plan the same step without it: --set {key}={remedy}"
            )
    declared = declared_model(config.shape, config.precision, target)
    mtp = config.sft.mtp == "on"
    optimizer = adamw(config.optim, (lambda path: True) if mtp else all_but_mtp)
    shape = _checked(config, mesh, config.train.batch_size, config.micro_batch_size)
    batch = _per_token(shape, mesh, ints=("tokens", "segment_ids"), floats=("weights",))
    state = abstract_state(declared, optimizer, mesh)
    step = train_step(declared, optimizer, supervised(config), schedule=config.mesh.schedule)
    return _training(step, state, batch, _knobs(config, mesh), mtp=mtp)


def prefer(config: Preference, mesh: AnyMesh, target: Target) -> Program:
    """Builds one step of DPO or of a reward model.

    Raises:
      ValueError: parameters or batch do not divide over the mesh.
    """
    group = config.preference
    declared = declared_model(config.shape, config.precision, target)
    scores = group.kind != "dpo"
    if scores:
        declared = RewardModel(config.shape, declared.policy)
    optimizer = adamw(config.optim, trains if scores else all_but_mtp)
    per_example = group.rows_per_example
    rows = per_example * config.train.batch_size, per_example * config.micro_batch_size
    shape = _checked(config, mesh, *rows)
    batch = _per_token(shape, mesh, ints=("tokens", "segment_ids", "counted"))
    known = {"dpo": "reference", "bradley_terry": None, "pointwise": "label"}[group.kind]
    if known:
        placement = batch_sharding(shape[:-1], mesh, inside=0)
        batch[known] = jax.ShapeDtypeStruct(shape[:-1], jnp.float32, sharding=placement)
    state = abstract_state(declared, optimizer, mesh)
    step = train_step(declared, optimizer, preference(config), schedule=config.mesh.schedule)
    return _training(step, state, batch, _knobs(config, mesh))


def update(config: Reinforcement, mesh: AnyMesh, target: Target) -> Program:
    """Builds the updates of one step of reinforcement learning, one for each minibatch, and the
    renewal of the reference.

    Raises:
      ValueError: parameters or rows do not divide over the mesh.
    """
    declared, state = _policy(config, mesh, target)
    batch = _answers(config, mesh)
    needed = {"ref": state.reference is not None, "old": config.rl.minibatches > 1}
    shape = batch["tokens"].shape
    batch |= _per_token(shape, mesh, floats=[name for name in needed if needed[name]])
    optimizer = adamw(config.optim, all_but_mtp)
    step = train_step(declared, optimizer, policy_objective(config), schedule=config.mesh.schedule)
    names = "learning_rate", "bias_update_speed", RENEW
    program = _training(
        all_minibatches(step, declared), state, batch, {name: number(mesh) for name in names}
    )
    return program._replace(updates=config.rl.minibatches)


def score(config: Reinforcement, mesh: AnyMesh, target: Target) -> Program:
    """Builds the pass that gives the answers' tokens their log-probabilities, under the policy that
    answered or under the reference. Beside it lies the state that trains.

    Raises:
      ValueError: parameters or rows do not divide over the mesh.
    """
    declared, state = _policy(config, mesh, target)
    batch = _answers(config, mesh)
    names = "tokens", "segment_ids", "experts", "kept"
    params = generating_shapes(declared, state.params)
    tokens = batch["tokens"].size - batch["tokens"].size // batch["tokens"].shape[-1]
    beside = _bytes((state, {name: batch[name] for name in batch if name not in names}))
    return Program(
        log_probabilities(config, declared),
        ((params, state.router), {name: batch[name] for name in names if name in batch}),
        (),
        None,
        tokens,
        batch["tokens"].shape[-2] * config.sequence_length,
        beside=beside,
        mtp=False,
    )


def rollout(config: Reinforcement, mesh: AnyMesh, target: Target) -> Program:
    """Builds one call of the decoding program of a rollout: one token for each of the answers that
    are generated at the same time. Beside it lie the state that trains and, if the rollout has a
    mesh of its own, the weights on the other.

    Args:
      mesh: that of the rollout.

    Raises:
      ValueError: parameters or answers do not divide over the mesh.
    """
    rl = config.rl
    answers = rl.prompts * rl.group_size
    training = describe_mesh(resolve(config.mesh.sizes, mesh.size))
    declared, state = _policy(config, training, target)
    rows = min(rl.max_batch, answers) if rl.max_batch else answers
    what = f"answers at the same time (rl.max_batch={rl.max_batch})"
    beside, look_up = _bytes(state), stored_spec
    if config.rollout_mesh.sizes:
        beside, look_up = beside + _cast_bytes(state, declared), generation_spec
    program = decoding(declared, mesh, rows, config.sequence_length, what, look_up)
    return program._replace(beside=beside)


def _policy(config: Reinforcement, mesh: AnyMesh, target: Target) -> tuple[Any, PolicyState]:
    declared = declared_model(config.shape, config.precision, target)
    state = abstract_state(declared, adamw(config.optim, all_but_mtp), mesh)
    return declared, with_reference(declared, state, keep=config.rl.beta > 0)


def _answers(config: Reinforcement, mesh: AnyMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns packed answers, [minibatches, micro-batches, rows, T + 1, ...]."""
    shape = _checked(config, mesh, config.train.batch_size, config.micro_batch_size)
    shape = config.rl.minibatches, *shape
    batch = _per_token(
        shape, mesh, ints=("tokens", "segment_ids"), floats=("weights", "advantages", "samp")
    )
    if config.replays:
        model = config.shape
        chosen = *shape, model.n_moe_layers, model.n_activated_experts
        placement = batch_sharding(chosen, mesh, inside=3)
        batch["experts"] = jax.ShapeDtypeStruct(chosen, jnp.int32, sharding=placement)
    if config.rl.filters:
        sets = *shape, token_sets.n_words(config.shape.vocab_size)
        placement = batch_sharding(sets, mesh, inside=2)
        batch["kept"] = jax.ShapeDtypeStruct(sets, jnp.uint32, sharding=placement)
    return batch


def _checked(config: Any, mesh: AnyMesh, rows: int, micro_batch: int) -> tuple[int, ...]:
    """Returns the shape of a batch's tokens, [micro-batches, rows, T + 1]."""
    pipelined_step.check(config, mesh)
    check_length(config.sequence_length, mesh)
    return rows // micro_batch, micro_batch, config.sequence_length + 1


def _per_token(
    shape: tuple[int, ...],
    mesh: AnyMesh,
    *,
    ints: Iterable[str] = (),
    floats: Iterable[str] = (),
) -> dict[str, jax.ShapeDtypeStruct]:
    placement = batch_sharding(shape, mesh)
    kinds = dict.fromkeys(ints, jnp.int32) | dict.fromkeys(floats, jnp.float32)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement)
        for name, dtype in kinds.items()
    }


def _knobs(config: FineTuning | Preference, mesh: AnyMesh) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: number(mesh) for name in hyperparameters.knobs(config, step=0)}


def _training(
    step: Any, state: Any, batch: dict[str, Any], knobs: dict[str, Any], *, mtp: bool = False
) -> Program:
    *outer, rows, length = batch["tokens"].shape
    passes = 1
    for size in outer:
        passes *= size
    tokens = rows * (length - 1)
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    results = placement, None
    return Program(step, (state, batch, knobs), (0,), results, passes * tokens, tokens, mtp=mtp)


def _cast_bytes(state: PolicyState, declared: Any) -> int:
    """Counts what a rollout's cast parameters take on a device; where no type changes, they are the
    state's own.
    """
    cast = generating_shapes(declared, state.params)
    pairs = zip(jax.tree.leaves(cast), jax.tree.leaves(state.params), strict=True)
    return 0 if all(new.dtype == old.dtype for new, old in pairs) else _bytes(cast)


def _bytes(tree: Any) -> int:
    return sum(map(shard_bytes, jax.tree.leaves(tree)))

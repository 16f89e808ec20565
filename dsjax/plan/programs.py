"""The programs that run on a slice, with the shapes and shardings of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dsjax.config import Config
from dsjax.config.roots import Planned
from dsjax.generate import decoding as engine
from dsjax.generate import sampling
from dsjax.kernels.target import Target
from dsjax.model.cache import check_split, entry_axes
from dsjax.model.layers import stays_float32
from dsjax.model.parameters import shardings
from dsjax.model.transformer import Transformer
from dsjax.parallel.sharding import LookUp, generation_spec, partition_spec
from dsjax.train import hyperparameters, pipelined_step
from dsjax.train.batches import batch_sharding
from dsjax.train.loss import pretraining
from dsjax.train.optimizer import adamw
from dsjax.train.pretraining import trained_by
from dsjax.train.step import abstract_state, declared_model, train_step


class Program(NamedTuple):
    """A function to compile and the arguments to compile it for."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # of jax.ShapeDtypeStruct with shardings
    donated: tuple[int, ...]  # arguments whose memory the results reuse
    results: Any  # shardings of the results; None: the compiler's choice
    tokens: int  # trained on, scored, or generated
    tokens_per_pass: int  # that go through the model together
    updates: int = 1  # of the optimizer
    mtp: bool = True  # whether the MTP modules run
    beside: int = 0  # bytes of one device's other arrays that stay where they are meanwhile
    look_up: LookUp = partition_spec  # how weights are split where the layers find them

    @property
    def argument_bytes(self) -> int:
        """Returns the bytes of one device's shards of the arguments."""
        return sum(map(shard_bytes, jax.tree.leaves(self.arguments)))


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    shard = (*leaf.sharding.shard_shape(leaf.shape), *raw.shape[len(leaf.shape) :])
    return math.prod(shard) * raw.dtype.itemsize


def number(mesh: Mesh | AbstractMesh, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    """Describes one number that all devices have."""
    return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _is_key(leaf: jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def train(config: Config, mesh: Mesh | AbstractMesh, target: Target) -> Program:
    """Builds one optimizer step of the full batch, as `dsjax.train` runs it.

    Raises:
      ValueError: parameters or batch do not divide over the mesh.
    """
    pipelined_step.check(config, mesh)
    rows, batch_size = config.micro_batch_size, config.train.batch_size
    shape = (batch_size // rows, rows, config.data.sequence_length + 1)
    sharding = batch_sharding(shape, mesh)
    declared = declared_model(config.model, config.precision, target)
    optimizer = adamw(config.optim, trained_by(config))
    state = abstract_state(declared, optimizer, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        for name in ("tokens", "segment_ids")
    }
    knobs = {name: number(mesh) for name in hyperparameters.knobs(config, step=0)}
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    return Program(
        train_step(declared, optimizer, pretraining(config), schedule=config.mesh.schedule),
        (state, batch, knobs),
        (0,),
        (placement, None),
        batch_size * config.data.sequence_length,
        rows * config.data.sequence_length,
    )


def decode(config: Planned, mesh: Mesh | AbstractMesh, target: Target) -> Program:
    """Builds one call of the decoding program, as `dsjax.generate` runs it: one token for each of a
    micro-batch's sequences, with a cache as long as a training row and weights in the compute type.

    Raises:
      ValueError: parameters or sequences do not divide over the mesh.
    """
    declared = declared_model(config.shape, config.precision, target)
    rows = "sequences of train.micro_batch_size"
    return decoding(declared, mesh, config.micro_batch_size, config.sequence_length, rows)


def decoding(
    declared: Transformer,
    mesh: Mesh | AbstractMesh,
    rows: int,
    length: int,
    what: str,
    look_up: LookUp = generation_spec,
) -> Program:
    """Builds what `decode` does, for any number of rows.

    Args:
      length: positions of the cache.
      what: the rows, for messages.
      look_up: how weights are split.
    """

    check_split(declared.config, mesh)

    def weights(variable: Any, placed: Any) -> Any:
        value = variable.get_value()
        dtype = value.dtype if stays_float32(variable) else declared.policy.compute
        struct = jax.ShapeDtypeStruct(value.shape, dtype, sharding=placed.get_value())
        return variable.copy(struct)

    model = jax.tree.map(
        weights,
        declared,
        shardings(declared, mesh, look_up),
        is_leaf=lambda leaf: hasattr(leaf, "get_value"),
    )

    def laid_out(leaf: jax.ShapeDtypeStruct, *axes: str) -> Any:
        spec = partition_spec(axes, leaf.shape, mesh, what)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    carry = jax.eval_shape(
        lambda: engine.empty_carry(declared, batch=rows, length=length, n_drafts=0)
    )
    carry = carry._replace(
        cache=jax.tree.map(
            lambda entry: laid_out(entry, *entry_axes(entry.shape, mesh)), carry.cache
        ),
        hidden_BWD=laid_out(carry.hidden_BWD, "batch", "tokens", "width"),
    )

    def per_row() -> tuple[Any, ...]:
        number_B = jnp.zeros(rows, jnp.int32)
        pair = number_B, number_B[:, None]
        return *pair, *pair, sampling.knobs([sampling.Sampling()] * rows)

    arguments = jax.tree.map(
        lambda leaf: laid_out(leaf, "batch", *("width",) * (leaf.ndim - 1)),
        jax.eval_shape(per_row),
    )
    count = number(mesh, jnp.int32)
    # Of a GPU's programs the one that never waits for the host.
    most_steps = None if declared.policy.target.kind == "gpu" else count
    arguments = model, carry, *arguments, most_steps, count
    return Program(engine.decode, arguments, (1,), None, rows, rows, mtp=False, look_up=look_up)

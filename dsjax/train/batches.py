"""Places batches on the devices of a mesh. Each process reads and places only its own rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dsjax.parallel.sharding import partition_spec


def batch_sharding(
    shape: tuple[int, ...], mesh: Mesh | AbstractMesh, *, per_token: bool = True
) -> NamedSharding:
    """Returns the placement of numbers per token, [..., sequences, T + 1], or per sequence,
    [..., sequences].

    Raises:
      ValueError: the sequences do not divide over the mesh.
    """
    # The length is split only after inputs and targets have been separated (`Objective.targets`),
    # so that a token and its target are never on different devices.
    axes = ("batch", "tokens") if per_token else ("batch",)
    axes = ("micro_batches",) * (len(shape) - len(axes)) + axes
    spec = partition_spec(
        axes, shape, mesh, "sequences of a micro-batch (train.micro_batch_size, mesh.microbatches)"
    )
    return NamedSharding(mesh, spec)


def held_rows(shape: tuple[int, ...], mesh: Mesh) -> np.ndarray:
    """Returns the numbers of the rows that this process's devices hold, ascending. Rows of a batch
    [..., sequences, T + 1] are numbered across micro-batches.
    """
    numbers = _numbers(shape)
    indices = batch_sharding(shape, mesh).addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([numbers[index[:-1]].ravel() for index in indices if index]))


def place_held(
    rows: Mapping[str, np.ndarray], shape: tuple[int, ...], mesh: Mesh
) -> dict[str, jax.Array]:
    """Assembles a batch from the rows that each process holds.

    Args:
      rows: numbers per token, [rows, T + 1], or per sequence, [rows].
      shape: that of numbers per token.
    """
    held, numbers = held_rows(shape, mesh), _numbers(shape)

    def array(own: np.ndarray) -> jax.Array:
        per_token, lead = own.ndim > 1, len(shape) - 1
        whole = shape if per_token else shape[:-1]

        def part(index: Any) -> np.ndarray:
            return own[np.searchsorted(held, numbers[index[:lead]])]

        return jax.make_array_from_callback(
            whole, batch_sharding(whole, mesh, per_token=per_token), part
        )

    return {name: array(own) for name, own in rows.items()}


def place_all(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a batch of which every process has all rows: numbers per token, [..., sequences,
    T + 1], as its `tokens` are, or per sequence, [..., sequences].
    """

    def array(whole: np.ndarray) -> jax.Array:
        placement = batch_sharding(whole.shape, mesh, per_token=whole.ndim == batch["tokens"].ndim)
        return jax.make_array_from_callback(whole.shape, placement, whole.__getitem__)

    return {name: array(whole) for name, whole in batch.items()}


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape[:-1])).reshape(shape[:-1])

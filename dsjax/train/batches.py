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
    shape: tuple[int, ...], mesh: Mesh | AbstractMesh, *, inside: int = 1
) -> NamedSharding:
    """Returns the placement of numbers per token, [..., sequences, T + 1].

    Args:
      inside: dims of a sequence: 0 for numbers per sequence, 2 for several per token.

    Raises:
      ValueError: the sequences do not divide over the mesh.
    """
    # The length is split only after inputs and targets have been separated (`Objective.targets`),
    # so that a token and its target are never on different devices.
    axes = ("micro_batches",) * (len(shape) - inside - 1) + ("batch",) + ("tokens",) * inside
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
      rows: numbers per token, [rows, T + 1], several per token, [rows, T + 1, ...], or one per
        sequence, [rows].
      shape: that of numbers per token.
    """
    held, numbers = held_rows(shape, mesh), _numbers(shape)

    def array(own: np.ndarray) -> jax.Array:
        whole = (*shape[:-1], *own.shape[1:])

        def part(index: Any) -> np.ndarray:
            return own[np.searchsorted(held, numbers[index[: numbers.ndim]])]

        placement = batch_sharding(whole, mesh, inside=own.ndim - 1)
        return jax.make_array_from_callback(whole, placement, part)

    return {name: array(own) for name, own in rows.items()}


def place_all(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a batch of which every process has all rows; `tokens` among its arrays, [...,
    sequences, T + 1], and the others are as in `place_held`.
    """
    outside = batch["tokens"].ndim - 1

    def array(whole: np.ndarray) -> jax.Array:
        placement = batch_sharding(whole.shape, mesh, inside=whole.ndim - outside)
        return jax.make_array_from_callback(whole.shape, placement, whole.__getitem__)

    return {name: array(whole) for name, whole in batch.items()}


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape[:-1])).reshape(shape[:-1])

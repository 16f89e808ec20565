"""Places batches on the devices of a mesh. Each process reads and places only its own rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dsjax.parallel.sharding import partition_spec


def batch_sharding(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the placement of numbers per token, [..., sequences, T + 1].

    Raises:
      ValueError: the sequences do not divide over the mesh.
    """
    # The length is split only after inputs and targets have been separated (`Objective.targets`),
    # so that a token and its target are never on different devices.
    axes = ("micro_batches",) * (len(shape) - 2) + ("batch", "tokens")
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
    """Assembles a batch of the given shape from the rows that each process holds."""
    sharding, held, numbers = batch_sharding(shape, mesh), held_rows(shape, mesh), _numbers(shape)

    def array(own: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return own[np.searchsorted(held, numbers[index[:-1]])]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: array(own) for name, own in rows.items()}


def place_all(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a batch [..., sequences, T + 1] of which every process has all rows."""
    return {
        name: jax.make_array_from_callback(
            array.shape, batch_sharding(array.shape, mesh), array.__getitem__
        )
        for name, array in batch.items()
    }


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape[:-1])).reshape(shape[:-1])

"""Batches on the devices of a mesh, of which each process reads and places only its own rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dsjax.parallel.sharding import partition_spec


def batch_sharding(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The placement of token ids [..., sequences, T + 1].

    Sequences are split; their length is not, since a token and the one it predicts may not part
    here: the model splits it once inputs and targets are apart.

    Raises:
      ValueError: the sequences do not divide over the mesh.
    """
    axes = ("micro_batches",) * (len(shape) - 2) + ("batch", "tokens")
    spec = partition_spec(
        axes, shape, mesh, "sequences of a micro-batch (train.micro_batch_size, mesh.microbatches)"
    )
    return NamedSharding(mesh, spec)


def held_rows(shape: tuple[int, ...], mesh: Mesh) -> np.ndarray:
    """Which rows of a batch [..., sequences, T + 1], counted through, this process's devices hold;
    ascending.
    """
    numbers = _numbers(shape)
    indices = batch_sharding(shape, mesh).addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([numbers[index[:-1]].ravel() for index in indices if index]))


def place_held(
    rows: Mapping[str, np.ndarray], shape: tuple[int, ...], mesh: Mesh
) -> dict[str, jax.Array]:
    """Makes a batch of the given shape of the rows that each process holds."""
    sharding, held, numbers = batch_sharding(shape, mesh), held_rows(shape, mesh), _numbers(shape)

    def array(own: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return own[np.searchsorted(held, numbers[index[:-1]])]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: array(own) for name, own in rows.items()}


def place_all(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch [..., sequences, T + 1] that every process has whole on the devices."""
    return {
        name: jax.make_array_from_callback(
            array.shape, batch_sharding(array.shape, mesh), array.__getitem__
        )
        for name, array in batch.items()
    }


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape[:-1])).reshape(shape[:-1])

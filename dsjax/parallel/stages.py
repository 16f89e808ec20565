"""Which layers the stages of a pipeline hold, and how parameters get there and gradients back.

Parameters are stored split over `pipe` along some dimension of each array, not by layer
(`dsjax.parallel.sharding.stored_spec`): any number of layers then divides over any number of ranks,
and a checkpoint has the same arrays on every mesh. Once per step an all-to-all along `pipe` brings
each rank the layers that it works on, and another one takes their gradients back.

Both are written by hand over all mesh axes. Left to the compiler, which splits the rest of a
pipeline over the other axes, an all-to-all or all-gather along `pipe` gathers the array over all
other axes first: 671B would not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsjax.parallel.sharding import split_over

PIPE = "pipe"
NONE = -1  # no layer, no dimension

Tree = Any


def stage_layers(n_layers: int, n_stages: int) -> np.ndarray:
    """Returns the layers of each stage, int32 [stages, n], in order and as evenly as possible, n
    being the most that a stage has. NONE fills the shorter stages up.
    """
    bounds = [stage * n_layers // n_stages for stage in range(n_stages + 1)]
    layers = np.full((n_stages, -(-n_layers // n_stages)), NONE, np.int32)
    for row, first, end in zip(layers, bounds[:-1], bounds[1:], strict=True):
        row[: end - first] = range(first, end)
    return layers


def bring(stored: Tree, specs: Tree, placed: np.ndarray) -> Tree:
    """[layers, ...] as stored -> all-to-all(pipe) -> [ranks * chunks * n, ...], split by rank.

    Args:
      specs: the PartitionSpec with which each array is stored. `pipe` is the last axis of one
        dimension, not the first; or it is not there, and every rank holds the array whole.
      placed: int32 [ranks, chunks, n], the layers that each rank works on, or NONE. Such a place
        gets the values of some layer.
    """
    rows = np.maximum(placed, 0).reshape(-1)

    def move(x: jax.Array, dim: int) -> jax.Array:
        assert dim != 0, "the layers' own dimension is not split where they are stored"
        if dim == NONE:
            return x[jnp.asarray(rows).reshape(len(placed), -1)[jax.lax.axis_index(PIPE)]]
        return jax.lax.all_to_all(x[rows], PIPE, 0, dim, tiled=True)

    return _by_hand(move, specs, specs, jax.tree.map(_by_rank, specs))(stored)


def give_back(worked: Tree, specs: Tree, placed: np.ndarray) -> Tree:
    """[ranks * chunks * n, ...] split by rank -> all-to-all(pipe) -> [layers, ...] as stored: the
    transpose of `bring`. Copies of a layer (DualPipe holds each stage twice) are added.
    """

    def move(x: jax.Array, dim: int) -> jax.Array:
        if dim == NONE:
            return add_copies(jax.lax.all_gather(x, PIPE, tiled=True), placed)
        return add_copies(jax.lax.all_to_all(x, PIPE, dim, 0, tiled=True), placed)

    return _by_hand(move, specs, jax.tree.map(_by_rank, specs), specs)(worked)


def add_copies(x: jax.Array, placed: np.ndarray) -> jax.Array:
    """[ranks * chunks * n, ...] -> [layers, ...]; every layer has as many copies as the others."""
    places = placed.reshape(-1)
    copies = [np.flatnonzero(places == layer) for layer in range(places.max() + 1)]
    return functools.reduce(jnp.add, [x[rows] for rows in np.stack(copies, axis=1)])


def gather(stored: Tree, specs: Tree) -> Tree:
    """As stored -> all-gather(pipe) -> the same on every rank."""

    def move(x: jax.Array, dim: int) -> jax.Array:
        return x if dim == NONE else jax.lax.all_gather(x, PIPE, axis=dim, tiled=True)

    return _by_hand(move, specs, specs, jax.tree.map(_without_pipe, specs))(stored)


def _by_hand(
    move: Callable[[jax.Array, int], jax.Array], specs: Tree, sources: Tree, targets: Tree
) -> Callable[[Tree], Tree]:
    """Returns `move` for a tree of arrays, each device moving its part. It also gets the dimension
    that `pipe` splits where the array is stored, or NONE.
    """
    dims = jax.tree.map(_pipe_dim, specs)
    return jax.shard_map(
        lambda tree: jax.tree.map(move, tree, dims),
        in_specs=(sources,),
        out_specs=targets,
        check_vma=False,
    )


def _pipe_dim(spec: PartitionSpec) -> int:
    return next((dim for dim, entry in enumerate(spec) if PIPE in split_over(entry)), NONE)


def _without_pipe(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(
        *(tuple(name for name in split_over(entry) if name != PIPE) or None for entry in spec)
    )


def _by_rank(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(PIPE, *_without_pipe(spec)[1:])

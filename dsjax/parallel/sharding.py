"""The axis table: which mesh axes hold which logical dimension, for parameters and activations.

A parameter names its dimensions where it is declared, an activation at block borders through
`constrain`. Both are looked up here and nowhere else.

The compiler splits the rest of the program accordingly. Where collectives are written by hand,
`dsjax.parallel.shards.on_shards` gives each device its shard of the arguments, by the same table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

# Logical dimension -> mesh axes. Parameters are split over fsdp along the model width, which is
# gathered at use, and over tensor along heads, feed-forward width and vocabulary, whose products
# stay split. The expert axis splits the routed experts by number, and all other weights as fsdp
# does, as context splits all weights. A weight without the model width, from a latent to the heads,
# is split along the heads. Axes that are gathered at use come last in a dimension, so that gathered
# shards are neighbours.
AXIS_TABLE: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "end_layers": (),
    "embed": ("fsdp", "context", "expert"),
    "expert_embed": ("fsdp", "context"),
    "router_embed": ("fsdp", "context", "expert"),  # a router's: float32 at use
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "latent": (),
    "latent_heads": ("tensor", "fsdp", "context", "expert"),
    "index_heads": ("fsdp", "context", "expert"),  # an indexer's, whole at use: scores add them up
    "ffn": ("tensor",),
    "experts": ("expert",),
    "replicas": (),  # where an expert's replicas are
    "norm": (),
    # activations
    "micro_batches": (),
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "tokens": (),  # a length that stays whole
    "length_shards": ("context", "data", "fsdp", "expert"),  # rows of `context.split_length`
    "width": (),
}


# (logical axes, shape, mesh, name for messages) -> how a parameter is split.
LookUp = Callable[[Sequence[str], Sequence[int], Mesh | AbstractMesh, str], PartitionSpec]


def partition_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh, path: str
) -> PartitionSpec:
    """Looks up an array's logical axes. Inside `shard_map`, mesh axes that it has split are left
    out: there the shape is that of a device's shard.

    Args:
      path: the array's name, for error messages.

    Raises:
      ValueError: an unknown logical axis, one mesh axis used twice, or a dimension that does not
        divide.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{path}: {len(axes)} logical axes {tuple(axes)} for shape {tuple(shape)}")
    entries: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        if axis not in AXIS_TABLE:
            raise ValueError(
                f"{path}: unknown logical axis {axis!r}; known: {', '.join(AXIS_TABLE)}"
            )
        mesh_axes = tuple(name for name in AXIS_TABLE[axis] if _size(mesh, name) > 1)
        if used & set(mesh_axes):
            raise ValueError(
                f"{path}: mesh axis {mesh_axes} is used twice for logical axes {tuple(axes)}"
            )
        used |= set(mesh_axes)
        parts = math.prod(mesh.shape[name] for name in mesh_axes)
        if size % parts:
            raise ValueError(
                f"{path}: dimension {axis}={size} of shape {tuple(shape)} does not divide over "
                f"{' x '.join(f'mesh.{name}={mesh.shape[name]}' for name in mesh_axes)}; "
                f"choose sizes that divide {size}"
            )
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def stored_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh, path: str
) -> PartitionSpec:
    """Looks up how the train state splits a parameter: as at use, and over `pipe` too.

    Layers need not divide over the ranks, so another dimension is split further: the one that fsdp
    splits, or else the first that divides. Parameters without one (norms) stay whole on every rank.
    """
    spec = partition_spec(axes, shape, mesh, path)
    dims = [dim for dim, axis in enumerate(axes) if not axis.endswith("layers")]
    dims.sort(key=lambda dim: "fsdp" not in AXIS_TABLE[axes[dim]])
    return _split_further(spec, dims, shape, mesh, "pipe")


def optimizer_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh, path: str
) -> PartitionSpec:
    """Looks up how a parameter's moments are split: as the parameter, and over `data` too (ZeRO-1).

    Each copy of the model then updates its own part of the parameters, which are gathered
    afterwards; together with the gradients' reduce-scatter that sends as much as their all-reduce
    would. The dimension that fsdp splits is split further where it divides; parameters without one
    (norms) stay whole on every device.
    """
    spec = stored_spec(axes, shape, mesh, path)
    dims = [dim for dim, axis in enumerate(axes) if "fsdp" in AXIS_TABLE[axis]]
    return _split_further(spec, dims, shape, mesh, "data")


def generation_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh, path: str
) -> PartitionSpec:
    """Looks up how generation splits a parameter: as declared, but along expert and context nothing
    except the routed experts.

    Training splits the other weights there too, and gathers them at use. A decoding step would send
    them all again for every token, which takes longer than the step; whole, they take memory. That
    is attention as DeepSeek serves it (V3, arXiv:2412.19437, section 3.4): split over a few devices
    by heads, and copied for each part of the rows. The experts are too large to be copied.
    """
    spec = partition_spec(axes, shape, mesh, path)
    if "experts" in axes:
        return spec
    return PartitionSpec(
        *(
            tuple(name for name in split_over(entry) if name not in ("context", "expert")) or None
            for entry in spec
        )
    )


def _split_further(
    spec: PartitionSpec,
    dims: Sequence[int],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    name: str,
) -> PartitionSpec:
    """Returns the spec with the first of `dims` that divides split over one more mesh axis. That
    comes last, so that the parts to be gathered at use are neighbours.
    """
    for dim in dims if _size(mesh, name) > 1 else ():
        names = (*split_over(spec[dim]), name)
        if shape[dim] % math.prod(mesh.shape[name] for name in names) == 0:
            return PartitionSpec(*spec[:dim], names, *spec[dim + 1 :])
    return spec


def divisible(x: jax.Array) -> jax.Array:
    """Appends zeros to a batch, [B, ...], as many as it lacks to divide over the mesh."""
    return jnp.pad(x, ((0, -len(x) % parts_here("batch")), *[(0, 0)] * (x.ndim - 1)))


def split_over(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of an entry of a PartitionSpec, which is None, a name or a tuple."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Returns the devices along a mesh axis, 1 if `shard_map` has split it already."""
    manual = mesh.manual_axes if isinstance(mesh, AbstractMesh) else ()
    return 1 if axis in manual else mesh.shape[axis]


def parts(axis: str, mesh: Mesh | AbstractMesh) -> int:
    """Counts the shards of a logical dimension on the mesh."""
    return math.prod(mesh.shape[name] for name in AXIS_TABLE[axis])


def parts_here(axis: str) -> int:
    """Counts the shards of a logical dimension on the current mesh, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else parts(axis, mesh)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Fixes an activation's layout under the current mesh; without one, returns it as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(_size(mesh, name) == 1 for name in mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, partition_spec(axes, x.shape, mesh, "activation"))
    )


def gather_for_use(w: jax.Array, axes: Sequence[str], dtype: DTypeLike) -> jax.Array:
    """Lays out a parameter for its products under the current mesh: as declared, and then, where
    expert splits a dimension that fsdp or context splits too, gathered along expert. The compiler
    gathers the rest.

    What does not divide stays as it lies. That is never a parameter, which would not have been
    placed, but may be the scales of a small weight: where `generation_spec` leaves a matrix whole,
    it can have fewer blocks than there are devices.

    Args:
      axes: logical axes of w's dimensions.
      dtype: the type in which w is sent where it is gathered; the result has w's own type.
    """
    if not _divides(axes, w):
        return w
    # Two steps, because the TPU's compiler gathers what all three dimensions of a torus split by
    # all-reduce, as a sum of arrays that are zero outside one shard: twice the bytes.
    if len(_steps(axes, w)) == 1:
        return constrain(w, *axes)
    return _gather_for_use(w, tuple(axes), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_for_use(w: jax.Array, axes: tuple[str, ...], dtype: DTypeLike) -> jax.Array:
    sent = w.astype(dtype)
    for spec in _steps(axes, w):
        sent = jax.lax.with_sharding_constraint(sent, spec)
    return sent.astype(w.dtype)


_gather_for_use.defvjp(
    lambda w, axes, dtype: (_gather_for_use(w, axes, dtype), None),
    lambda axes, dtype, _, dw: (reduce_to_shards(dw, *axes),),
)


def reduce_to_shards(dw: jax.Array, *axes: str) -> jax.Array:
    """Sums a parameter's gradient straight into each device's shard, step by step as
    `gather_for_use` gathers it.
    """
    for spec in _steps(axes, dw)[:0:-1]:
        dw = jax.lax.with_sharding_constraint(dw, spec)
    return constrain(dw, *axes)


def _divides(axes: Sequence[str], w: jax.Array) -> bool:
    """Tells whether the current mesh can lay out an array as declared."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or all(
        size % math.prod(_size(mesh, name) for name in AXIS_TABLE[axis]) == 0
        for axis, size in zip(axes, w.shape, strict=True)
    )


def _steps(axes: Sequence[str], w: jax.Array) -> list[PartitionSpec]:
    """Returns a parameter's layout as declared and, if it differs, when gathered along expert."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return [PartitionSpec()]
    spec = partition_spec(axes, w.shape, mesh, "parameter")
    both = ("fsdp", "expert"), ("context", "expert")
    gathered = PartitionSpec(
        *(names[:-1] if names and names[-2:] in both else names for names in spec)
    )
    return [spec] if gathered == spec else [spec, gathered]


def split_axes(*logical: str) -> tuple[str, ...]:
    """Returns the axes of the current mesh that split these logical dimensions, whether the
    compiler or `shard_map` splits them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    return tuple(name for axis in logical for name in AXIS_TABLE[axis] if mesh.shape[name] > 1)

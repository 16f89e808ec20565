"""The axis table: which mesh axes hold which logical dimension, for parameters and activations.

A parameter names its dimensions where it is declared; an activation names them at block borders
through `constrain`. Both are looked up here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# Logical dimension -> mesh axes. Parameters are split over fsdp along the model width, which is
# gathered at use, and over tensor along heads, feed-forward width and vocabulary, whose products
# stay split.
AXIS_TABLE: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "latent": (),
    "ffn": ("tensor",),
    "experts": ("expert",),
    "norm": (),
    # batches of token ids, before inputs and targets are apart
    "micro_batches": (),
    "tokens": (),
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": (),
    "width": (),
}


def partition_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh, path: str
) -> PartitionSpec:
    """Looks an array's logical axes up.

    Args:
      path: the array's name, for the errors.

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
        mesh_axes = tuple(name for name in AXIS_TABLE[axis] if mesh.shape[name] > 1)
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


def parts(axis: str, mesh: Mesh | AbstractMesh) -> int:
    """How many parts of a logical dimension the mesh holds."""
    return math.prod(mesh.shape[name] for name in AXIS_TABLE[axis])


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pins an activation's layout under the current mesh; without one it is left alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, partition_spec(axes, x.shape, mesh, "activation"))
    )

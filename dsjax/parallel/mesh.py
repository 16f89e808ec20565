"""The device mesh: the sizes of its axes, and which device lies where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from dsjax.axes import AXES


def resolve(sizes: Mapping[str, int], n_devices: int, group: str = "mesh") -> dict[str, int]:
    """Returns the size of every axis, in `AXES` order.

    Args:
      sizes: devices along each axis; one may be -1 to take what the others leave.
      group: of the config that gives them, for messages.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    given = math.prod(size for size in sizes.values() if size != -1)
    resolved = {axis: sizes.get(axis, 1) for axis in AXES}
    for axis, size in resolved.items():
        if size == -1:
            resolved[axis] = max(n_devices // given, 1)
    if math.prod(resolved.values()) != n_devices:
        described = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"{group} {described} does not fill the {n_devices} devices here; "
            f"set {group}.* so that the sizes multiply to {n_devices} (one axis may be -1)"
        )
    return resolved


def make_mesh(
    sizes: Mapping[str, int],
    n_devices: int | None = None,
    *,
    devices: Sequence[Any] | None = None,
    group: str = "mesh",
) -> Mesh:
    """Lays devices out along the named axes, those that communicate most where the network is fast.

    Args:
      n_devices: how many devices to use, all by default.
      devices: which to choose from, JAX's own by default.
      group: see `resolve`.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = (jax.devices() if devices is None else devices)[:n_devices]
    resolved = resolve(sizes, len(devices) if n_devices is None else n_devices, group)
    return Mesh(
        _arrange(tuple(resolved.values()), devices),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def regrouped(mesh: Mesh, sizes: Mapping[str, int]) -> Mesh:
    """Makes a mesh of other sizes from the devices of a mesh, in the same order, so that one
    program can move arrays from one to the other.

    Args:
      sizes: as `make_mesh` takes them; rollout_mesh.* of a config.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    shape = tuple(resolve(sizes, mesh.size, "rollout_mesh").values())
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Returns an array of devices of this shape, network neighbours along its last dimensions."""
    left = slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # A torus without dimensions of these sizes has its dimensions cut.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # The network between slices is slow: the first axes that divide run across them.
    between = []
    for size in shape:
        between.append(math.gcd(size, left))
        left //= between[-1]
    within = tuple(size // parts for size, parts in zip(shape, between, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )


def describe_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Returns a mesh of these sizes without devices, for questions about shapes and shardings.

    Raises:
      ValueError: a size is left open.
    """
    for axis, size in sizes.items():
        if size == -1:
            raise ValueError(
                f"mesh {axis}=-1 takes what other axes leave, but here are no devices to count; "
                "give its size"
            )
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def submesh(sizes: Mapping[str, int]) -> Mesh | None:
    """Makes a mesh of as many devices as the sizes multiply to, all of them if one size is -1.

    Returns:
      None for no sizes: the default device, without a mesh.

    Raises:
      ValueError: there are fewer devices.
    """
    if not sizes:
        return None
    wanted = jax.device_count() if -1 in sizes.values() else math.prod(sizes.values())
    if wanted > jax.device_count():
        described = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh {described} needs {wanted} devices, there are {jax.device_count()}; lower the "
            "sizes"
        )
    return make_mesh(sizes, wanted)


def two_meshes(
    sizes: Mapping[str, int], others: Mapping[str, int]
) -> tuple[Mesh | None, Mesh | None]:
    """Makes two meshes that share no device, as `submesh` makes one; the first takes the first
    devices.

    Args:
      others: sizes of the second mesh, --prefill-mesh; {} for none. A size of -1, in one of the
        two, takes what the other mesh leaves.

    Raises:
      ValueError: there are fewer devices than both need, or they do not divide.
    """
    if not others:
        return submesh(sizes), None
    there, both = jax.device_count(), (sizes, others)
    wanted = [math.prod(size for size in each.values() if size != -1) for each in both]
    takes_rest = [-1 in each.values() for each in both]
    described = " and ".join(
        f"{name} {' x '.join(f'{axis}={size}' for axis, size in each.items()) or 'of one device'}"
        for name, each in zip(("mesh", "prefill_mesh"), both, strict=True)
    )
    if all(takes_rest):
        raise ValueError(
            f"{described} each take what the other leaves; give the sizes of one of them"
        )
    if sum(wanted) > there:
        raise ValueError(
            f"{described} need {sum(wanted)} devices that they do not share, and there are "
            f"{there}; lower the sizes"
        )
    for index in (0, 1):
        if takes_rest[index]:
            wanted[index] = there - wanted[1 - index]
    mesh = make_mesh(sizes, wanted[0]) if sizes else None
    rest = jax.devices()[wanted[0] :]
    return mesh, make_mesh(others, wanted[1], devices=rest, group="prefill_mesh")

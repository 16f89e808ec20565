"""TPU slices by name: which chips, how many, and what each can do.

A name is a generation and the slice's shape in chips: `v5p:8x8x8` is a torus of 512. What JAX calls
a device is a chip, except on tpu7x, where a chip holds two. Figures are from the vendor's data
sheets; `hbm` is what the compiler allows a program, as it says when a program does not fit.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from importlib.util import find_spec
from typing import Any, NamedTuple

from dsjax.kernels.target import Target

_GIB = 2**30


class Device(NamedTuple):
    """The figures of one device of a generation; rates are per second."""

    generation: str
    example: str
    host: tuple[int, ...]  # chips per host; a slice's shape is a multiple
    per_chip: int
    hbm: int  # bytes
    flops: float  # bfloat16
    hbm_bandwidth: float  # bytes
    ici_bandwidth: float  # bytes sent over all links together


_DEVICES = {
    device.generation: device
    for device in (
        Device("v4", "v4:4x4x4", (2, 2, 1), 1, int(30.75 * _GIB), 275e12, 1.228e12, 6 * 45e9),
        Device("v5e", "v5e:4x4", (2, 2), 1, int(15.75 * _GIB), 197e12, 0.82e12, 4 * 45e9),
        Device("v5p", "v5p:8x8x8", (2, 2, 1), 1, int(95.74 * _GIB), 459e12, 2.765e12, 6 * 90e9),
        Device("v6e", "v6e:16x16", (2, 2), 1, int(31.25 * _GIB), 918e12, 1.64e12, 4 * 90e9),
        Device(
            "tpu7x", "tpu7x:4x4x4", (2, 2, 1), 2, int(94.75 * _GIB), 1153.5e12, 3.69e12, 6 * 50e9
        ),
    )
}  # fmt: skip


class Topology(NamedTuple):
    """A slice that need not exist here."""

    name: str
    device: Device
    shape: tuple[int, ...]  # chips along each dimension of the torus

    @property
    def target(self) -> Target:
        version = re.sub(r"\D", "", self.device.generation)
        return Target("tpu", (int(version),))

    @property
    def n_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def n_devices(self) -> int:
        return self.n_chips * self.device.per_chip


def parse(name: str) -> Topology:
    """Parses a name such as `v5p:8x8x8`.

    Raises:
      ValueError: there is no such generation, or it does not come in this shape.
    """
    generation, _, text = name.strip().lower().partition(":")
    if generation not in _DEVICES:
        examples = [device.example for device in _DEVICES.values()]
        near = difflib.get_close_matches(generation, _DEVICES, n=2, cutoff=0.4)
        hint = " or ".join(_DEVICES[key].example for key in near)
        raise ValueError(
            f"there is no topology {name!r}; {f'did you mean {hint}? ' if hint else ''}a topology "
            f"is a generation of TPU and a shape in chips, such as {', '.join(examples)}"
        )
    device = _DEVICES[generation]
    rank = len(device.host)
    if not re.fullmatch("x".join([r"[1-9]\d*"] * rank), text):
        raise ValueError(
            f"topology {name!r}: a shape of {generation} is {rank} whole numbers, "
            f"such as {device.example}"
        )
    shape = tuple(int(size) for size in text.split("x"))
    if any(size % chips for size, chips in zip(shape, device.host, strict=True)):
        raise ValueError(
            f"topology {name!r}: its shape must be a multiple of a host's "
            f"{'x'.join(map(str, device.host))} chips, such as {device.example}"
        )
    return Topology(f"{generation}:{text}", device, shape)


def devices(topology: Topology) -> list[Any]:
    """Lists the slice's devices as the TPU compiler describes them; no TPU is needed.

    Raises:
      ValueError: the compiler is not installed or does not know such a slice.
    """
    if find_spec("libtpu") is None:
        raise ValueError(
            "compiling for a TPU takes its compiler, libtpu, which is not installed; install the "
            "extra `plan` (pip install -e '.[plan]'), or leave compiling out with --no-compile"
        )
    # There is no TPU host to query, nor a TPU that two processes could compete for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu").devices)
    except Exception as error:
        raise ValueError(f"the TPU compiler refuses topology {topology.name!r}: {error}") from error

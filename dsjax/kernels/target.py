"""The machine that a program is compiled for, which decides on its kernels.

A `Target` is read from JAX's devices, or described: programs are also compiled for machines that
are not here. A model's `dsjax.precision.policy.Policy` carries it down to the kernels.

On an NVIDIA GPU, besides what XLA makes of plain programs, there are:

* on Hopper (H100, H200): the grouped products of `dsjax.kernels.hopper_grouped`, the FP8 products
  of `dsjax.kernels.hopper_scaled`, whose operands `dsjax.precision.hopper_quantize` makes, cuDNN's
  attention, and within documents that of `dsjax.kernels.hopper_attention`, with what `jax[cuda]`
  installs;
* on others: tokamax, the kernels of JAX's authors, where it is installed. It needs Python 3.12 and
  a later JAX than Python 3.11 has, so it is an extra, `[kernels]`. Without it the experts run as
  `lax.ragged_dot`, which XLA turns into a dense product on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax

_KINDS = ("cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of machine; hashable, so a static argument.

    Attributes:
      kind: "cpu", "gpu" or "tpu".
      capability: an NVIDIA GPU's compute capability, (9, 0) for Hopper; a TPU's generation, (7,)
        for tpu7x. Empty for a CPU, and where it is unknown: then no kernel relies on it.
      multiprocessors: streaming multiprocessors of a GPU.

    Raises:
      ValueError: there are no kernels for this kind.
    """

    kind: str
    capability: tuple[int, ...] = ()
    multiprocessors: int = 132  # of an H100 SXM or H200

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise ValueError(
                f"there are no kernels for platform {self.kind!r}; use one of {', '.join(_KINDS)}, "
                "for instance with JAX_PLATFORMS=cpu"
            )

    @classmethod
    def of(cls, device: Any) -> Target:
        """Reads a device's target; it may be one that JAX only describes."""
        if device.platform == "gpu":
            # AMD's compute capabilities are names, such as "gfx942".
            version = re.fullmatch(r"(\d+)\.(\d+)", str(device.compute_capability))
            return cls("gpu", _numbers(version), getattr(device, "core_count", cls.multiprocessors))
        if device.platform == "tpu":
            return cls("tpu", _numbers(re.match(r"TPU ?v?(\d+)", device.device_kind)))
        return cls(device.platform)

    @classmethod
    def here(cls) -> Target:
        """Reads the target of JAX's own devices, all of one kind."""
        return cls.of(jax.devices()[0])

    @property
    def is_hopper(self) -> bool:
        return self.kind == "gpu" and self.capability == (9, 0)

    @property
    def multiplies_e4m3(self) -> bool:
        """Whether its matrix units take E4M3 operands: those of NVIDIA GPUs from compute capability
        8.9 (Ada), and of TPU v7x. AMD's earlier E4M3 has other exponents.
        """
        first = {"gpu": (8, 9), "tpu": (7,)}.get(self.kind)
        return first is not None and self.capability >= first


HOPPER = Target("gpu", (9, 0))


def _numbers(match: re.Match[str] | None) -> tuple[int, ...]:
    return tuple(map(int, match.groups())) if match else ()


@functools.cache
def tokamax() -> Any:
    """Returns the module, or None where it is not installed."""
    try:
        import tokamax as module  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "tokamax":
            raise
        return None
    return module

"""Element types of a run, and the machine that it is compiled for."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.kernels.target import Target, tokamax
from dsjax.precision.fp8 import Scale


@dataclasses.dataclass(frozen=True)
class Policy:
    """Element types of a run and the machine whose kernels it uses.

    Master weights, gradients, router, norm statistics, softmax, rope angles and the loss are
    always float32.

    Attributes:
      compute: type of activations, and of weights at use.
      target: the machine that programs are compiled for; by default JAX's own devices.
      fp8: scales with which linear layers quantise their operands; None: they do not.
      native_fp8: whether the matrix units multiply the E4M3 numbers themselves; by default they do
        where they can.

    Raises:
      ValueError: `fp8` is not a kind of scale.
    """

    compute: DTypeLike = jnp.bfloat16
    target: Target = dataclasses.field(default_factory=Target.here)
    fp8: Scale | None = None
    native_fp8: bool | None = None

    def __post_init__(self):
        if self.fp8 not in ("fp32", "pow2", None):
            raise ValueError(f"fp8={self.fp8!r} is not a kind of scale; use 'fp32' or 'pow2'")
        if self.native_fp8 is None:
            native = self.fp8 is not None and self.target.multiplies_e4m3
            object.__setattr__(self, "native_fp8", native)

    def travels(self, stored: DTypeLike) -> DTypeLike:
        """Returns the type in which weights are sent: the multiplier's, unless scales must first be
        found for the master weights, or they are stored in a narrower one.
        """
        wide = jnp.dtype(jnp.float32 if self.fp8 else self.compute)
        return stored if jnp.dtype(stored).itemsize < wide.itemsize else wide


def advice(compute: DTypeLike, target: Target) -> str | None:
    """Returns what to set if this machine is slow in `compute`, or None if it is not."""
    is_bfloat16 = jnp.dtype(compute) == jnp.bfloat16
    if target.kind == "cpu" and is_bfloat16:
        return (
            "a CPU computes in bfloat16 far more slowly than in float32: set "
            "precision.compute=float32"
        )
    if target.kind == "gpu" and not (target.is_hopper and is_bfloat16) and not tokamax():
        return (
            "experts and attention run without kernels of their own, slowly: on an H100 or H200 "
            "set precision.compute=bfloat16; on other GPUs, with Python 3.12: "
            "pip install -e '.[kernels]'"
        )
    return None

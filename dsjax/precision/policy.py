"""Which element type does what, and on which kind of machine."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.precision.fp8 import Scale

_PLATFORMS = ("cpu", "gpu", "tpu")


def multiplies_e4m3(device: Any) -> bool:
    """Whether a device, or one described, has matrix units that take E4M3 operands.

    NVIDIA GPUs from compute capability 8.9 (Ada; Hopper is 9.0), and TPU v7x. AMD's earlier E4M3
    has other exponents.
    """
    if device.platform == "gpu":
        capability = re.fullmatch(r"(\d+)\.(\d+)", str(device.compute_capability))
        return bool(capability) and tuple(map(int, capability.groups())) >= (8, 9)
    return device.platform == "tpu" and device.device_kind.startswith("TPU7x")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Element types of a run and the platform whose kernels it uses.

    Master weights, gradients, router, norm statistics, softmax, rope angles and the loss are
    float32 always; `compute` is what activations, and weights at use, are. `platform` is "cpu",
    "gpu" or "tpu": the default is where JAX runs; a program compiled here for elsewhere names it.
    `fp8` is the kind of scale with which linear layers quantise their operands, None for not at
    all, and `native_fp8` whether the matrix units there then multiply the E4M3 numbers themselves;
    by default they do if JAX's device can and is of that platform.

    Raises:
      ValueError: the platform has no kernels, hence no path for FP8 either, or `fp8` is no kind of
        scale.
    """

    compute: DTypeLike = jnp.bfloat16
    platform: str = dataclasses.field(default_factory=jax.default_backend)
    fp8: Scale | None = None
    native_fp8: bool | None = None

    def __post_init__(self):
        if self.platform not in _PLATFORMS:
            raise ValueError(
                f"platform {self.platform!r} has no kernels here, and no way to multiply in FP8; "
                f"use one of {', '.join(_PLATFORMS)}, for instance with JAX_PLATFORMS=cpu"
            )
        if self.fp8 not in ("fp32", "pow2", None):
            raise ValueError(f"fp8={self.fp8!r} is not a kind of scale; use 'fp32' or 'pow2'")
        if self.native_fp8 is None:
            # Without FP8 no device is looked for: what only declares a model needs none.
            device = jax.devices()[0] if self.fp8 else None
            native = device is not None and device.platform == self.platform
            object.__setattr__(self, "native_fp8", native and multiplies_e4m3(device))

    @property
    def travels(self) -> DTypeLike:
        """What weights are sent as: the multiplier's type, unless scales have to be found for the
        master weights first.
        """
        return jnp.float32 if self.fp8 else self.compute

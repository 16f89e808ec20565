"""What kernels an NVIDIA GPU has here, besides what XLA makes of plain programs.

* Hopper (H100, H200): the grouped products of `dsjax.kernels.hopper_grouped` and cuDNN's attention,
  both with what `jax[cuda]` installs.
* Others: tokamax, the kernels that JAX's authors keep, where it is installed. It needs Python 3.12
  and a later JAX than Python 3.11 has, so it is an extra, `[kernels]`. Without it experts are
  multiplied by `lax.ragged_dot`, which XLA turns into a dense product on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax


@functools.cache
def is_hopper() -> bool:
    """Whether JAX's devices are of compute capability 9.0."""
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", None)) == "9.0"


@functools.cache
def tokamax() -> Any:
    """The module, or None where it is not installed."""
    try:
        import tokamax as module  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "tokamax":
            raise
        return None
    return module

"""tokamax, the kernels that JAX's authors keep for GPUs: used where it is installed.

It needs Python 3.12 and a later JAX than Python 3.11 has, so it is an extra, `[kernels]`. Without
it a GPU multiplies experts by `lax.ragged_dot`, which XLA turns into a dense product there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax


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


@functools.cache
def is_hopper() -> bool:
    """Whether JAX's device is an H100, H200 or GH200."""
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")

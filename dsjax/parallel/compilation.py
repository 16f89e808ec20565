"""Compiling a step once per batch shape, apart from running it, so that it is timed by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from dsjax.files import cache_folder
from dsjax.kernels.target import Target

# Transfers between GPUs start as early as possible and overlap with products that do not need them.
# (A TPU's compiler does so by default.)
_BETWEEN_GPUS: dict[str, bool | str] = {"xla_gpu_enable_latency_hiding_scheduler": True}
_TPU: dict[str, bool | str] = {
    # Gather a weight whole before its product, not piece by piece in a loop per product: that makes
    # the program 40 % shorter (for a dense model of two layers) and shows plainly what it sends.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"
}


def compiler_options(target: Target, n_devices: int) -> dict[str, bool | str]:
    """Returns what to tell the compiler about a program for this many devices."""
    if target.kind == "gpu" and n_devices > 1:
        return dict(_BETWEEN_GPUS)
    return dict(_TPU) if target.kind == "tpu" else {}


def use_persistent_cache(cache_dir: str) -> None:
    """Keeps compiled programs between runs, unless the user has configured a cache.

    Args:
      cache_dir: data.cache_dir; if empty, $XDG_CACHE_HOME/dsjax or ~/.cache/dsjax.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder(cache_dir) / "compiled"))
    # By default only those that took a second are kept: a server has dozens of shorter ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class Compiled:
    """A jitted function of state and batch, compiled on the first call per batch shape.

    Attributes:
      seconds: time spent on compilation so far.
    """

    def __init__(self, function: Any, mesh: Mesh, *, announce: Callable[[], None] = lambda: None):
        """
        Args:
          mesh: the devices to compile for.
          announce: called when a compilation starts.
        """
        self._function = function
        self._mesh = mesh
        self._announce = announce
        self._programs: dict[Any, Any] = {}
        self.seconds = 0.0

    def __call__(self, state: Any, batch: Any, *rest: Any) -> Any:
        if not self.is_compiled(batch):
            self.compile(state, batch, *rest)
        return self._programs[_shapes(batch)](state, batch, *rest)

    def is_compiled(self, batch: Any) -> bool:
        """Returns whether there is a program for this batch shape."""
        return _shapes(batch) in self._programs

    def compile(self, state: Any, batch: Any, *rest: Any) -> None:
        """Compiles the program for these arguments without running it."""
        self._announce()
        start = time.perf_counter()
        with jax.set_mesh(self._mesh):
            self._programs[_shapes(batch)] = self._function.lower(state, batch, *rest).compile()
        self.seconds += time.perf_counter() - start


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))

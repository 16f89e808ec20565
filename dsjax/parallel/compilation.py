"""Compiling a step once per batch shape, apart from running it, so that it is timed by itself."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import jax
from jax.sharding import Mesh

from dsjax.display import Display, size
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

    def __init__(
        self, function: Any, mesh: Mesh, *, what: str = "a program", display: Display | None = None
    ):
        """
        Args:
          mesh: the devices to compile for.
          what: the function is, for the display, which shows each compilation and its result.
        """
        self._function = function
        self._mesh = mesh
        self._what, self._display = what, display
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
        display, start = self._display, time.perf_counter()
        shown = display.working(f"compiling {self._what}") if display else contextlib.nullcontext()
        with shown, jax.set_mesh(self._mesh):
            program = self._function.lower(state, batch, *rest).compile()
        self._programs[_shapes(batch)] = program
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if display:
            display.say(f"compiled {self._what} in {seconds:.0f} s{_needs(program, self._mesh)}")


def _needs(program: Any, mesh: Mesh) -> str:
    """Says how much memory a program takes on a device, where the compiler and the device know."""
    memory = program.memory_analysis()
    if memory is None:
        return ""
    statistics = mesh.local_devices[0].memory_stats() or {}
    limit = f" of {size(statistics['bytes_limit'])}" if "bytes_limit" in statistics else ""
    # Not the peak: on a CPU that leaves out what a program allocates while it runs.
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes + own
    return f"; it takes {size(taken)}{limit} per device"


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))

"""Compilation kept apart from the steps, so that it is timed by itself and done once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dsjax.kernels.target import Target

# What is sent between GPUs starts as early as it can, beside products that do not need it. (A TPU's
# compiler does so by itself.)
_BETWEEN_GPUS: dict[str, bool | str] = {"xla_gpu_enable_latency_hiding_scheduler": True}
_TPU: dict[str, bool | str] = {
    # Weights are gathered whole before a product, not piece by piece in a loop of its own for each:
    # the program has 40 % less text (a dense model of two layers), and says plainly what it sends.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"
}


def compiler_options(target: Target, n_devices: int) -> dict[str, bool | str]:
    """Returns what to tell the compiler about a program for this many devices."""
    if target.kind == "gpu" and n_devices > 1:
        return dict(_BETWEEN_GPUS)
    return dict(_TPU) if target.kind == "tpu" else {}


def use_persistent_cache(cache_dir: str) -> None:
    """Keeps compiled programs between runs, unless the user has chosen a place for them.

    Args:
      cache_dir: data.cache_dir; empty is $XDG_CACHE_HOME/dsjax, else ~/.cache/dsjax.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(cache_dir).expanduser() if cache_dir else Path(home) / "dsjax"
    jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))


class Compiled:
    """A jitted function of state and batch, compiled before the first call for each batch shape.

    Attributes:
      seconds: time spent compiling so far.
    """

    def __init__(self, function: Any, mesh: Mesh, *, announce: Callable[[], None] = lambda: None):
        """`announce` is called when a compilation, for the devices of `mesh`, starts."""
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
        """Whether there is a program for this shape of batch."""
        return _shapes(batch) in self._programs

    def compile(self, state: Any, batch: Any, *rest: Any) -> None:
        """Compiles the program for these arguments, without running it."""
        self._announce()
        start = time.perf_counter()
        with jax.set_mesh(self._mesh):
            self._programs[_shapes(batch)] = self._function.lower(state, batch, *rest).compile()
        self.seconds += time.perf_counter() - start


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))

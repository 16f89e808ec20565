"""Compiles a program for an H100 or H200 that need not be here.

The GPU compiler of `jax[cuda]` needs no GPU, only a description of one. What it would decide by
running candidates on the GPU it then decides by its own tables: which kernel multiplies, and in
which tiles. So kernels, copies and loops of the program are those of a GPU nearly always, their
tiles not.

`dsjax.plan.kernels` and `dsjax.plan.launches` read what comes out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import jax

from dsjax.parallel.mesh import make_mesh
from dsjax.plan.programs import Program

# Of memory: bytes and bytes per second, from NVIDIA's data sheets of the SXM modules. The compiler
# computes results again where memory would not suffice.
_MEMORY = {"H100": (84942979072, 3352320000000), "H200": (150754820096, 4800000000000)}

# Of both, from CUDA's table of compute capabilities. Versions are those that kernels are chosen
# for.
_DESCRIPTION = Template("""
platform_name: "CUDA"
device_description_str: "NVIDIA $gpu"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: $bandwidth
  device_memory_size: $size
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}
""")


def is_installed() -> bool:
    """Tells whether the compiler is here."""
    return any(
        find_spec("jax_plugins") and find_spec(f"jax_plugins.{plugin}")
        for plugin in ("xla_cuda13", "xla_cuda12")
    )


def mesh(gpu: str = "H100") -> Any:
    """Returns a mesh of the one GPU, as the compiler describes it.

    Args:
      gpu: "H100" or "H200".

    Raises:
      ValueError: the compiler is not installed.
    """
    if not is_installed():
        raise ValueError(
            "compiling for a GPU takes its compiler, which is not installed; install the extra "
            "`plan_gpu` (pip install -e '.[plan_gpu]')"
        )
    from jax.experimental import topologies

    size, bandwidth = _MEMORY[gpu]
    description = _DESCRIPTION.substitute(gpu=gpu, size=size, bandwidth=bandwidth)
    described = topologies.get_topology_desc(
        platform="cuda", target_config=description, topology="1x1x1"
    )
    return make_mesh({"data": 1}, devices=list(described.devices))


def compiled_text(program: Program, mesh: Any, options: Mapping[str, Any] | None = None) -> str:
    """Compiles a program that was built for `mesh()` and `HOPPER`: the text of what runs.

    Args:
      options: for the compiler, by their names in XLA.
    """
    function = jax.jit(
        program.function,
        donate_argnums=program.donated,
        out_shardings=program.results,
        keep_unused=True,
        compiler_options=dict(options or {}),
    )
    with jax.set_mesh(mesh):
        traced = function.trace(*program.arguments)
        return str(traced.lower(lowering_platforms=("cuda",)).compile().as_text())


class Compiled(NamedTuple):
    """What runs, and what the host starts of it."""

    text: str  # for `dsjax.plan.kernels`
    thunks: str  # for `dsjax.plan.launches`


def compiled(program: Program, mesh: Any, options: Mapping[str, Any] | None = None) -> Compiled:
    """Does what `compiled_text` does, and has XLA write down its sequence of thunks."""
    with tempfile.TemporaryDirectory() as folder:
        text = compiled_text(program, mesh, {**(options or {}), "xla_dump_to": folder})
        # Of two, before and after thunks were put into command buffers, the latter; if none were,
        # the first is all there is.
        *_, last = sorted(Path(folder).glob("*thunk_sequence*.txt"))
        return Compiled(text, last.read_text())

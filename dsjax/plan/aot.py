"""Compiles a step for a described slice, and reads what the compiler says about it.

No TPU is needed: the TPU compiler runs on any machine and says whether a program is valid, how much
memory it takes per device, and what it sends over the network.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dsjax.config.roots import Planned
from dsjax.parallel.compilation import compiler_options
from dsjax.parallel.mesh import make_mesh
from dsjax.plan import collectives, operations, steps
from dsjax.plan.programs import Program
from dsjax.plan.topology import Topology, devices

# The program is not run, so the machine code of its operations may be slow. Writing it well takes
# most of the compiler's time, and begins when buffers and collectives are settled.
_SLOW_CODE: dict[str, bool | str] = {
    "xla_jf_convolution_performance_target": "0",  # a product's code: short, not unrolled
    "xla_jf_critical_path_scheduler": False,
    "xla_jf_vliw_scheduler": False,
    # Loops where the code of element-wise operations and of sorts would be unrolled.
    "xla_tpu_enable_emitter_rolling": True,
    "xla_tpu_roll_intra_lane_for_bitonic_sort": True,
}


class CompilerFigures(NamedTuple):
    """What the compiler says; bytes are per device. The peak is that of the program together with
    the arrays that lie beside it.
    """

    fits: bool
    peak_bytes_per_device: int
    argument_bytes: int
    program_flops: float  # of all devices together
    compile_seconds: float
    compile_cpu_seconds: float
    program_text_bytes: int  # before optimisation
    # None where the program does not fit.
    temporary_bytes: int | None = None
    output_bytes: int | None = None  # results that do not take the memory of arguments
    code_bytes: int | None = None  # of slow code, not of what a run would have
    collectives: list[collectives.Collective] | None = None
    collectives_error: str | None = "the program does not fit"  # why there are none


def compile_step(config: Planned, topology: Topology, step: str) -> CompilerFigures:
    """Compiles a program of `dsjax.plan.steps`.

    Raises:
      ValueError: the config does not fit the slice's number of devices, or there is no compiler.
      jax.errors.JaxRuntimeError: the compiler rejects the program for a reason other than memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _compile(config, topology, step, Path(folder))


def _compile(config: Planned, topology: Topology, step: str, folder: Path) -> CompilerFigures:
    """Does what `compile_step` does; the compiler dumps its programs into `folder`."""
    mesh = make_mesh(steps.mesh_sizes(config, step), devices=devices(topology))
    program = steps.build(config, step, mesh, topology.target)
    function = jax.jit(
        program.function,
        donate_argnums=program.donated,
        out_shardings=program.results,
        # Unused arguments, such as the MTP modules when decoding, take memory too.
        keep_unused=True,
        compiler_options={
            **compiler_options(topology.target, mesh.size),
            **_SLOW_CODE,
            "xla_dump_to": str(folder),
            "xla_dump_hlo_as_text": True,
        },
    )
    start, cpu_start = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        traced = function.trace(*program.arguments)
        lowered = traced.lower(lowering_platforms=(topology.target.kind,))
        flops = operations.count(traced.jaxpr, rows_per_expert(config, program))
        text_bytes = len(lowered.as_text())
        used, executable = 0, None
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            used = bytes_wanted(str(error))
            if not used:
                raise
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if executable is None:
        used, arguments = used + program.beside, program.argument_bytes
        return CompilerFigures(False, used, arguments, flops, seconds, cpu_seconds, text_bytes)
    memory: Any = executable.memory_analysis()
    peak = memory.peak_memory_in_bytes + program.beside
    return CompilerFigures(
        peak <= topology.device.hbm,
        peak,
        memory.argument_size_in_bytes,
        flops,
        seconds,
        cpu_seconds,
        text_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        *_collectives(folder),
    )


def rows_per_expert(config: Planned, program: Program) -> float:
    """Returns the assignments per expert in one pass under an even load."""
    model = config.shape
    if not model.n_routed_experts:
        return 0.0
    return program.tokens_per_pass * model.n_activated_experts / model.n_routed_experts


def _collectives(folder: Path) -> tuple[list[collectives.Collective] | None, str | None]:
    """Reads the collectives of the optimised program that the compiler has dumped.

    Returns:
      the collectives, or None and the reason.
    """
    # The dump is read since JAX cannot give the text of every executable of a described device.
    programs_there = folder.glob("*.after_optimizations.txt")
    largest = max(programs_there, key=lambda file: file.stat().st_size, default=None)
    if largest is None:
        return None, "the compiler has not dumped its program"
    return collectives.parse(largest.read_text()), None


def bytes_wanted(message: str) -> int | None:
    """Parses the memory that a program needed out of the compiler's message that it does not fit.

    Returns:
      bytes per device, arguments included, or None if the message says something else.
    """
    # What the second message calls temporaries is the sum of arguments and temporaries.
    used = r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"
    total = r"for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds"
    match = re.search(used, message) or re.search(total, message)
    return match and int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))

"""A lower bound on a step's time: the slowest of arithmetic, memory and network.

Each is taken at the data sheet's rate, as if the other two were hidden behind it. How much slower a
real step is, only a run can tell.
"""

from __future__ import annotations

from typing import NamedTuple

from dsjax.plan.topology import Topology


class Roofline(NamedTuple):
    """Seconds per step; `limit` names the largest of the three."""

    compute_seconds: float
    memory_seconds: float
    network_seconds: float | None  # None: the program's collectives are unknown
    step_seconds: float
    limit: str
    mfu: float  # model FLOPs relative to the peak of all devices


def roofline(
    topology: Topology,
    *,
    program_flops: float,
    model_flops: float,
    memory_bytes: float,
    network_bytes: float | None,
) -> Roofline:
    """Bounds a step.

    Args:
      program_flops: what the program computes on all devices, recomputation included.
      model_flops: what the model needs (`dsjax.model.flops`).
      memory_bytes: read and written per device.
      network_bytes: sent per device; None: unknown.
    """
    device = topology.device
    peak = device.flops * topology.n_devices
    seconds = {
        "compute": program_flops / peak,
        "memory": memory_bytes / device.hbm_bandwidth,
        "network": None if network_bytes is None else network_bytes / device.ici_bandwidth,
    }
    limit = max(seconds, key=lambda name: seconds[name] or 0.0)
    step = seconds[limit] or 0.0
    return Roofline(
        program_flops / peak,
        memory_bytes / device.hbm_bandwidth,
        seconds["network"],
        step,
        limit,
        model_flops / (peak * step),
    )

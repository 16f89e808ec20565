"""Floating-point operations of a traced program: matrix products only, all devices together.

The compiler's own count omits kernels and counts a loop's body once. Here a scan counts its trips
and a kernel its own work. Whatever depends on data is counted as under an even load of the experts:
a conditional takes its cheapest branch (later rounds of dispatch are for uneven loads), a grouped
product has as many rows as its experts then get, and a loop of unknown length counts once. What
nobody reads is not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

# These say what they multiply; a grouped product says what it would if all rows were full.
_SPARSE_KERNELS = ("index_scores", "chosen_blocks")
# Equations that return what the program inside them returns.
_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "shard_map")


def count(program: ClosedJaxpr, rows_per_expert: float) -> float:
    """Adds up a program's operations; a multiplication and an addition are two.

    Args:
      rows_per_expert: assignments per expert in one pass, over all devices.
    """
    return _count(program.jaxpr, 1, rows_per_expert)


def _count(jaxpr: Any, devices: int, rows: float, wanted: Sequence[bool] | None = None) -> float:
    """
    Args:
      devices: how many run this part of the program, each on a shard of its own.
      wanted: which results are read; None: all. XLA leaves out what nobody reads.
    """
    wanted = wanted or [True] * len(jaxpr.outvars)
    read = {id(result) for result, is_read in zip(jaxpr.outvars, wanted, strict=True) if is_read}
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        wanted = [id(result) in read for result in equation.outvars]
        if any(wanted):
            read.update(map(id, equation.invars))
            total += _equation(equation, devices, rows, wanted)
    return total


def _equation(equation: Any, devices: int, rows: float, wanted: Sequence[bool]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return devices * _dot(equation)
    if name == "ragged_dot_general":
        return devices * 2.0 * equation.invars[0].aval.size * equation.outvars[0].aval.shape[-1]
    if name == "pallas_call":
        return devices * _kernel(equation, rows)
    if name == "cond":
        branches = [branch.jaxpr for branch in params["branches"]]
        counts = [_count(branch, devices, rows) for branch in branches]
        shares = [_share(branch) for branch in branches]
        if any(shares):
            return sum(share * count for share, count in zip(shares, counts, strict=True))
        return min(counts)
    if name == "shard_map":
        mesh, manual = params["mesh"], params["newly_manual_axes"]
        devices *= math.prod(mesh.shape[axis] for axis in manual)
        # An expert's rows come from all devices of the data axes, and so do its weights' shards.
        # The ranks of a pipeline work on micro-batches and layers of their own.
        others = [axis for axis in manual if axis not in ("expert", "pipe")]
        rows /= math.prod(mesh.shape[axis] for axis in others)
    trips = params["length"] if name == "scan" else 1
    # What a call returns is what its program returns; what a loop returns, it may read itself.
    results = wanted if name in _CALLS else None
    return trips * sum(_count(inner, devices, rows, results) for inner in _inner(params))


def _share(branch: Any) -> float:
    """Returns the share of a loop's trips that take a branch, read from the name that `in_ticks` of
    `dsjax.parallel.pipeline` gives it; 0 without such a name.
    """
    for equation in branch.eqns:
        if found := re.search(r"(\d+)_of_(\d+)_ticks", str(equation.source_info.name_stack)):
            return int(found[1]) / int(found[2])
    return 0.0


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs inside an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _dot(equation: Any) -> float:
    left, right = (variable.aval.shape for variable in equation.invars)
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    summed = math.prod(left[axis] for axis in contracted)
    shared = math.prod(left[axis] for axis in batch)
    return 2.0 * math.prod(left) * math.prod(right) / (summed * shared)


def _kernel(equation: Any, rows: float) -> float:
    """Counts a call of one of the kernels that the model has on a TPU."""
    name = str(equation.params.get("name") or equation.params.get("name_and_src_info"))
    shapes = [variable.aval.shape for variable in equation.invars if _is_float(variable.aval)]
    if "splash" in name:
        # Splash attention: q [.., N, T, H], k [.., P, T, H], v [.., P, T, W]; half of the square.
        (*heads, length, width), value_width = shapes[0], shapes[2][-1]
        products = 3 * width + 2 * value_width if "dkv" in name else width + value_width
        return float(math.prod(heads)) * length**2 * products
    if any(known in name for known in _SPARSE_KERNELS):
        return float(equation.params["cost_estimate"].flops)
    # A grouped product: where each group's rows begin and the last one's end, rows of all groups
    # [A, D], and matrices among the operands or as the result, a layer's or those of all layers.
    out = equation.outvars[0].aval.shape
    ints = (variable.aval.shape for variable in equation.invars if not _is_float(variable.aval))
    groups = next(shape[0] for shape in ints if shape) - 1
    _, dim, width = out if len(out) == 3 else next(s for s in shapes if len(s) == 3)
    return 2.0 * min(groups * rows, shapes[0][0]) * dim * width


def _is_float(aval: Any) -> bool:
    return hasattr(aval, "dtype") and aval.dtype.kind not in "iub"

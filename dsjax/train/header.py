"""What a run is going to do, told before it compiles: its size, devices, cost and files."""

from __future__ import annotations

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.table import Table

from dsjax import tables
from dsjax.config.janus import Janus
from dsjax.config.roots import Experiment
from dsjax.display import size
from dsjax.model.flops import count_parameters
from dsjax.model.parameters import declarations
from dsjax.train.optimizer import Optimizer


def table(
    config: Experiment | Janus,
    declared: Any,
    abstract: Any,
    mesh: Mesh,
    *,
    optimizer: Optimizer,
    folder: Path,
    takes: str,
    flops_per_token: float,
    tokens: int | None = None,
) -> Table:
    """Returns the table.

    Args:
      declared: the model without values.
      abstract: the state's shapes and shardings.
      optimizer: of the run, which knows what trains.
      folder: of the run.
      takes: what a step takes of the data.
      flops_per_token: that training needs.
      tokens: of the whole run; None where nobody knows, since the model itself makes them.
    """
    counts = count_parameters(declarations(declared), config.shape)
    mtp = f", and {counts.mtp:,} in MTP modules" if counts.mtp else ""
    steps, cost = f"{config.train.steps:,} steps", f"{_scaled(flops_per_token)}FLOP per token"
    if tokens is not None:
        steps += f", {tokens:,} tokens"
        cost += f", {_scaled(flops_per_token * tokens)}FLOP in the run"
    precision = config.precision
    rows = [
        ("parameters", f"{counts.total:,}, {counts.activated:,} of them activated per token{mtp}"),
        ("computes in", precision.compute + (", products in FP8" if precision.fp8 == "on" else "")),
        ("devices", _devices(mesh)),
        ("a step", takes),
        ("the run", steps),
        ("training", cost),
        ("memory per device", _memory(abstract, optimizer)),
        ("files", str(folder)),
    ]
    return tables.figures(config.name, rows)


def sequences(config: Experiment | Janus, length: int) -> str:
    """Says what a step of sequences of `length` takes."""
    n, at_once = config.train.batch_size, config.micro_batch_size
    passes = f", in {n // at_once} passes" if n > at_once else ""
    return f"{n} sequences of {length:,}, {n * length:,} tokens{passes}"


def bytes_per_device(abstract: Any) -> dict[str, int]:
    """Returns what one device holds of each part of a state, in bytes."""
    return {
        field.name: _bytes(getattr(abstract, field.name)) for field in dataclasses.fields(abstract)
    }


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _memory(abstract: Any, optimizer: Optimizer) -> str:
    trained, _ = optimizer.split(abstract.params)
    # A gradient is float32, as its parameter, and split the same way; what is frozen has none.
    parts = {**bytes_per_device(abstract), "gradients": _bytes(trained)}
    listed = ", ".join(f"{name} {size(number)}" for name, number in parts.items() if number)
    return f"at least {size(sum(parts.values()))}: {listed}"


def _devices(mesh: Mesh) -> str:
    kinds = collections.Counter(device.device_kind for device in mesh.devices.flat)
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    axes = " x ".join(f"{axis}={count}" for axis, count in mesh.shape.items() if count > 1)
    processes = jax.process_count()
    together = f", of {processes} processes" if processes > 1 else ""
    return f"{listed}{together}" + (f", as mesh {axes}" if axes else "")


def _scaled(number: float) -> str:
    """1_230_000 -> '1.23 M'."""
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:,.0f} "

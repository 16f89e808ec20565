"""The plan of a config on a slice: figures as JSON, and the same as tables."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.text import Text

from dsjax import tables
from dsjax.config import Config
from dsjax.model import flops
from dsjax.parallel.mesh import describe_mesh, resolve
from dsjax.plan import aot, estimate, programs
from dsjax.plan.roofline import roofline
from dsjax.plan.topology import Topology


def make(config: Config, topology: Topology, step: str, *, compiled: bool) -> dict[str, Any]:
    """Plans a step.

    Args:
      step: "train" or "decode".
      compiled: whether to ask the compiler; otherwise memory and network are reckoned.

    Raises:
      ValueError: config and slice do not fit each other, or there is no compiler.
    """
    mesh = describe_mesh(resolve(config.mesh.sizes, topology.n_devices))
    program = programs.STEPS[step](config, mesh, topology.target)
    reckoned = estimate.reckon(config, mesh, program, step)
    model_flops = _model_flops(config, step) * program.tokens
    result = aot.compile_step(config, topology, step) if compiled else None
    figures = _compiled(result) if result else _reckoned(reckoned, topology)
    line = roofline(
        topology,
        program_flops=figures["program_flops"],
        model_flops=model_flops,
        memory_bytes=reckoned.memory_traffic,
        network_bytes=figures["network_bytes_per_device"],
    )
    return {
        "name": config.name,
        "step": step,
        "topology": topology.name,
        "devices": topology.n_devices,
        "mesh": resolve(config.mesh.sizes, topology.n_devices),
        "compiled": compiled,
        "sequence_length": config.data.sequence_length,
        "tokens": program.tokens,
        "tokens_per_device_and_pass": program.tokens_per_pass / topology.n_devices,
        "remat": config.train.remat,
        "hbm_bytes": topology.device.hbm,
        **figures,
        "estimated_peak_bytes_per_device": reckoned.peak,
        "estimated_parts": reckoned.parts,
        "model_flops": model_flops,
        "roofline": line._asdict(),
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
    }


def _model_flops(config: Config, step: str) -> int:
    """Operations that a token needs: a new one attends to the whole cache."""
    length = config.data.sequence_length
    if step == "train":
        return flops.train_flops_per_token(config.model, length)
    return flops.forward_flops_per_token(config.model, length, causal=False)


def _compiled(result: aot.Compiled) -> dict[str, Any]:
    found = result.collectives
    return {
        "fits": result.fits,
        "peak_bytes_per_device": result.peak,
        "argument_bytes": result.arguments,
        "temporary_bytes": result.temporaries,
        "output_bytes": result.output,
        "code_bytes": result.code,
        "program_flops": result.program_flops,
        "collectives": None if found is None else [item._asdict() for item in found],
        "collectives_error": result.collectives_error,
        "network_bytes_per_device": None if found is None else sum(item.bytes for item in found),
        "compile_seconds": result.compile_seconds,
        "compile_cpu_seconds": result.compile_cpu_seconds,
        "program_text_bytes": result.program_bytes,
    }


def _reckoned(reckoned: estimate.Estimate, topology: Topology) -> dict[str, Any]:
    return {
        "fits": reckoned.peak <= topology.device.hbm,
        "peak_bytes_per_device": reckoned.peak,
        "argument_bytes": reckoned.arguments,
        "temporary_bytes": reckoned.peak - reckoned.arguments,
        "program_flops": reckoned.program_flops,
        "network_bytes_per_device": reckoned.network,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Prints what fits, where memory goes, what is sent, and what limits a step."""
    how = "compiled" if plan["compiled"] else "reckoned, not compiled"
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    title = (
        f"{plan['name']}: {plan['step']} step on {plan['topology']}, {plan['devices']} devices "
        f"({mesh or 'one device'}), {how}"
    )
    console.print(Text(title), soft_wrap=True)
    console.print(tables.figures("", _rows(plan)))
    parts = plan["estimated_parts"] | {"total": plan["estimated_peak_bytes_per_device"]}
    rows = ((part, _giga(size, "B")) for part, size in parts.items())
    title = "where memory goes at its peak, reckoned"
    console.print(tables.table(title, ("part", ">a device"), rows))
    if plan.get("collectives") is not None:
        columns = ("kind", ">calls", ">a device sends")
        rows = (
            (item["kind"], item["calls"], _giga(item["bytes"], "B")) for item in plan["collectives"]
        )
        console.print(tables.table("collectives of a step", columns, rows))
    elif plan.get("collectives_error"):
        console.print(Text(f"collectives: {plan['collectives_error']}"))


def _rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    line = plan["roofline"]
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    rows = [
        (
            f"tokens a device and pass, at {plan['sequence_length']:,}",
            f"{plan['tokens_per_device_and_pass']:,.0f}",
        ),
        ("memory of a device, peak", _giga(plan["peak_bytes_per_device"], "B")),
        ("    arguments", _giga(plan["argument_bytes"], "B")),
        ("    temporaries", _giga(plan["temporary_bytes"], "B")),
        ("    output besides", _giga(plan.get("output_bytes"), "B")),
        (f"of {_giga(plan['hbm_bytes'], 'B')}", verdict),
        ("FLOPs of the program, all devices", _giga(plan["program_flops"], "", 1e12, "T")),
        ("FLOPs of the model", _giga(plan["model_flops"], "", 1e12, "T")),
        ("program / model", f"{plan['program_flops'] / plan['model_flops']:.2f}"),
        ("a device sends", _giga(plan["network_bytes_per_device"], "B")),
        ("at best: arithmetic", _seconds(line["compute_seconds"])),
        ("at best: memory", _seconds(line["memory_seconds"])),
        ("at best: network", _seconds(line["network_seconds"])),
        (f"a step takes at least ({line['limit']})", _seconds(line["step_seconds"])),
        ("MFU at most", f"{line['mfu']:.1%}"),
    ]
    if plan["compiled"]:
        rows.append(("compilation", _seconds(plan["compile_seconds"])))
        rows.append(("    of all cores", _seconds(plan["compile_cpu_seconds"])))
    return rows


def _giga(value: float | None, unit: str, scale: float = 1e9, prefix: str = "G") -> str:
    return "-" if value is None else f"{value / scale:,.2f} {prefix}{unit}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"

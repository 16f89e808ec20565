"""The figures of a config's step on a slice, ready for JSON, and the same as tables."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.text import Text

from dsjax import tables
from dsjax.config.roots import Planned
from dsjax.parallel.mesh import describe_mesh, resolve
from dsjax.plan import aot, estimate, steps
from dsjax.plan.roofline import roofline
from dsjax.plan.topology import Topology


def of_step(
    config: Planned, topology: Topology, step: str | None, *, compiled: bool
) -> dict[str, Any]:
    """Returns the figures of one program, or of all that a training step runs: those of the program
    that updates, with those of the others in `others`.

    The arguments are those of `make`, but `step` may be None for all.
    """
    first, *others = [step] if step else steps.of_training(config)
    plan = make(config, topology, first, compiled=compiled)
    if others:
        plan["others"] = [make(config, topology, other, compiled=compiled) for other in others]
    return plan


def make(config: Planned, topology: Topology, step: str, *, compiled: bool) -> dict[str, Any]:
    """Returns the figures of a step.

    Args:
      step: train, score or decode.
      compiled: whether to ask the compiler; otherwise memory and network are estimated.

    Raises:
      ValueError: config and slice do not fit each other, or there is no compiler.
    """
    mesh = describe_mesh(resolve(steps.mesh_sizes(config, step), topology.n_devices))
    program = steps.build(config, step, mesh, topology.target)
    estimated = estimate.estimate(config, mesh, program, step)
    found = _compiled(config, topology, step) if compiled else _estimated(estimated, topology)
    limits = roofline(
        topology,
        program_flops=found["program_flops"],
        model_flops=estimated.model_flops,
        memory_bytes=estimated.memory_traffic,
        network_bytes=found["network_bytes_per_device"],
    )
    return {
        "name": config.name,
        "step": step,
        "topology": topology.name,
        "devices": topology.n_devices,
        "mesh": dict(mesh.shape),
        "compiled": compiled,
        "sequence_length": config.sequence_length,
        "tokens": program.tokens,
        "tokens_per_device_and_pass": program.tokens_per_pass / topology.n_devices,
        "remat": config.train.remat,
        "hbm_bytes": topology.device.hbm,
        "beside_bytes": program.beside,
        **found,
        "estimated_peak_bytes_per_device": estimated.peak,
        "estimated_parts": estimated.parts,
        "model_flops": estimated.model_flops,
        "roofline": limits._asdict(),
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
    }


def _compiled(config: Planned, topology: Topology, step: str) -> dict[str, Any]:
    found = aot.compile_step(config, topology, step)._asdict()
    sent = found["collectives"]
    return found | {
        "collectives": None if sent is None else [kind._asdict() for kind in sent],
        "network_bytes_per_device": None if sent is None else sum(kind.bytes for kind in sent),
    }


def _estimated(estimated: estimate.Estimate, topology: Topology) -> dict[str, Any]:
    arguments = estimated.parts["arguments"]
    return {
        "fits": estimated.peak <= topology.device.hbm,
        "peak_bytes_per_device": estimated.peak,
        "argument_bytes": arguments,
        "temporary_bytes": estimated.peak - arguments - estimated.parts.get(estimate.BESIDE, 0),
        "program_flops": estimated.program_flops,
        "network_bytes_per_device": estimated.network,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def print_step(plan: dict[str, Any], console: Console) -> None:
    """Prints what `of_step` returned."""
    for each in (plan, *plan.get("others", ())):
        print_plan(each, console)


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Prints whether a step fits, where its memory goes, what it sends, and what limits it."""
    how = "compiled" if plan["compiled"] else "estimated, not compiled"
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    title = (
        f"{plan['name']}: {plan['step']} step on {plan['topology']}, {plan['devices']} devices "
        f"({mesh or 'one device'}), {how}"
    )
    console.print(Text(title), soft_wrap=True)
    console.print(tables.figures("", _rows(plan)))
    parts = plan["estimated_parts"] | {"total": plan["estimated_peak_bytes_per_device"]}
    rows = [(part, _giga(size, "B")) for part, size in parts.items()]
    title = "where memory goes at its peak, estimated"
    console.print(tables.table(title, ("part", ">per device"), rows))
    if plan.get("collectives") is not None:
        sent = plan["collectives"]
        rows = [(kind["kind"], kind["calls"], _giga(kind["bytes"], "B")) for kind in sent]
        columns = ("kind", ">calls", ">sent per device")
        console.print(tables.table("collectives of a step", columns, rows))
    elif plan.get("collectives_error"):
        console.print(Text(f"collectives: {plan['collectives_error']}"))


def _rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    limits = plan["roofline"]
    rows = [
        (
            f"tokens per device and pass, at length {plan['sequence_length']:,}",
            f"{plan['tokens_per_device_and_pass']:,.0f}",
        ),
        ("peak memory per device", _giga(plan["peak_bytes_per_device"], "B")),
        ("    arguments", _giga(plan["argument_bytes"], "B")),
        ("    arrays beside the program", _giga(plan["beside_bytes"], "B")),
        ("    temporaries", _giga(plan["temporary_bytes"], "B")),
        ("    output not in place of arguments", _giga(plan.get("output_bytes"), "B")),
        (f"of {_giga(plan['hbm_bytes'], 'B')}", "fits" if plan["fits"] else "DOES NOT FIT"),
        ("FLOPs of the program, all devices", _giga(plan["program_flops"], "", 1e12, "T")),
        ("FLOPs of the model", _giga(plan["model_flops"], "", 1e12, "T")),
        ("program / model", f"{plan['program_flops'] / plan['model_flops']:.2f}"),
        ("sent per device", _giga(plan["network_bytes_per_device"], "B")),
        ("lower bound: arithmetic", _seconds(limits["compute_seconds"])),
        ("lower bound: memory", _seconds(limits["memory_seconds"])),
        ("lower bound: network", _seconds(limits["network_seconds"])),
        (f"a step takes at least ({limits['limit']})", _seconds(limits["step_seconds"])),
        ("MFU at most", f"{limits['mfu']:.1%}"),
    ]
    if plan["compiled"]:
        rows.append(("compilation", _seconds(plan["compile_seconds"])))
        rows.append(("    CPU time", _seconds(plan["compile_cpu_seconds"])))
    return rows


def _giga(value: float | None, unit: str, scale: float = 1e9, prefix: str = "G") -> str:
    return "-" if value is None else f"{value / scale:,.2f} {prefix}{unit}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"

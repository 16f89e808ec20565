"""Describes a config: what a step takes, the parameters it declares, their cost and placement.

All figures come from declared shapes. No device is used, so 671B parameters take a second.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from dsjax import settings, tables
from dsjax.config.finetuning import FineTuning
from dsjax.config.preference import Preference
from dsjax.config.pretraining import Config
from dsjax.config.reinforcement import Reinforcement
from dsjax.config.roots import Experiment
from dsjax.kernels.target import Target
from dsjax.model import flops
from dsjax.model.layers import RouterState
from dsjax.model.parameters import Declaration, declarations
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import describe_mesh
from dsjax.parallel.sharding import AXIS_TABLE, optimizer_spec, stored_spec
from dsjax.precision.policy import Policy


def summarize(config: Experiment) -> dict[str, Any]:
    """Returns everything that is shown, as JSON values. FLOPs are for the length of a row.

    If no mesh axis is open (-1), this includes what each device holds.

    Raises:
      ValueError: parameters do not divide over the mesh; lists them all.
    """
    model, length = config.shape, config.sequence_length
    # The shapes are the same everywhere; a named target keeps jax from starting a backend to ask.
    policy = Policy(jnp.dtype(config.precision.compute), Target("cpu"))
    declared = declarations(Transformer(model, policy))
    counts = flops.count_parameters(declared, model)
    train = {
        "causal": flops.train_flops_per_token(model, length, mtp=False),
        "full_square": flops.train_flops_per_token(model, length, causal=False, mtp=False),
        "causal_with_mtp": flops.train_flops_per_token(model, length),
    }
    placed = {} if -1 in config.mesh.sizes.values() else _placed(declared, config)
    return {
        "name": config.name,
        "config": settings.to_dict(config),
        "step": _step(config),
        "total_params": counts.total,
        "activated_params": counts.activated,
        "mtp_params": counts.mtp,
        "sequence_length": length,
        "train_flops_per_token": train,
        "forward_flops_per_token": flops.forward_flops_per_token(model, length),
        "kv_cache_bytes_per_token": flops.cache_bytes_per_token(model),
        "parameters": [
            {
                "path": parameter.path,
                "shape": list(parameter.shape),
                "dtype": jnp.dtype(parameter.dtype).name,
                "count": parameter.count,
                "axes": list(parameter.axes),
            }
            for parameter in declared
        ],
        "sharding": {
            parameter.path: [_mesh_axes(config, axis) for axis in parameter.axes]
            for parameter in declared
        },
        **placed,
    }


def _step(config: Experiment) -> dict[str, int]:
    """Counts what one step takes: of data, or of what the model answers."""
    train, length = config.train, config.sequence_length
    if isinstance(config, (Config, FineTuning)):
        sequences, at_once = train.batch_size, config.micro_batch_size
        return {
            "sequences": sequences, "tokens": sequences * length, "sequences_per_pass": at_once,
        }  # fmt: skip
    if isinstance(config, Preference):
        rows = config.preference.rows_per_example
        return {
            "examples": train.batch_size,
            "sequences": rows * train.batch_size,
            "tokens": rows * train.batch_size * length,
            "sequences_per_pass": rows * config.micro_batch_size,
        }
    rl = config.rl
    answers = rl.prompts * rl.group_size
    return {
        "questions": rl.prompts,
        "answers": answers,
        "answer_tokens_at_most": answers * rl.max_new_tokens,
        "updates": rl.minibatches,
        "answers_per_update": answers // rl.minibatches,
        "rows_per_update_multiple_of": train.batch_size,
        "tokens_per_row": length,
        "rows_per_pass": config.micro_batch_size,
    }


def _placed(declared: list[Declaration], config: Experiment) -> dict[str, Any]:
    """Returns what one device holds of the parameters, the optimizer's two moments and average, if
    any, and, where a policy is compared with one, the reference, in bytes.
    """
    mesh = describe_mesh(config.mesh.sizes)
    moment = jnp.dtype(config.optim.moment_dtype)
    average = jnp.dtype(jnp.float32).itemsize if config.optim.ema else 0
    compared = isinstance(config, Reinforcement) and config.rl.beta > 0
    reference = jnp.dtype(config.precision.compute).itemsize if compared else 0
    shards, problems = {}, []
    for parameter in declared:
        arguments = parameter.axes, parameter.shape, mesh, parameter.path
        try:
            spec, moments_spec = stored_spec(*arguments), optimizer_spec(*arguments)
        except ValueError as error:
            problems.append(str(error))
            continue
        local, moments = (
            NamedSharding(mesh, s).shard_shape(parameter.shape) for s in (spec, moments_spec)
        )
        trained = parameter.kind is not RouterState
        shards[parameter.path] = {
            "shape": list(local),
            "bytes": math.prod(local) * jnp.dtype(parameter.dtype).itemsize,
            "optimizer_bytes": trained
            * (2 * math.prod(moments) * moment.itemsize + average * math.prod(local)),
            **({"reference_bytes": math.prod(local) * reference * trained} if compared else {}),
        }
    if problems:
        raise ValueError("\n".join(problems))
    kinds = "bytes", "optimizer_bytes", *(("reference_bytes",) if compared else ())
    totals = {key: sum(shard[key] for shard in shards.values()) for key in kinds}
    return {"mesh": dict(mesh.shape), "device": totals, "shards": shards}


def _mesh_axes(config: Experiment, logical_axis: str) -> list[str]:
    """Returns the mesh axes of size above 1, or open, over which a logical axis may be split."""
    return [axis for axis in AXIS_TABLE[logical_axis] if getattr(config.mesh, axis) != 1]


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the resolved config, what a step does, the parameters with their sharding, and the
    totals.
    """
    for group, values in summary["config"].items():
        if isinstance(values, dict):
            tables.print_values(console, f"{summary['name']}: {group}", values)
    step = [(name.replace("_", " "), count) for name, count in summary["step"].items()]
    console.print(tables.figures("a step", step))
    console.print(_parameter_table(summary))
    console.print(tables.figures("totals", _totals(summary)))


def _parameter_table(summary: dict[str, Any]) -> Table:
    axes = "logical axes -> mesh axes"
    columns, shards = ["parameter", "shape", ">count", axes], summary.get("shards")
    if shards:
        columns += ["on a device", ">bytes", ">optimizer"]
        columns += [">reference"] if "reference_bytes" in summary["device"] else []
    rows = []
    for parameter in summary["parameters"]:
        path = parameter["path"]
        placed = zip(parameter["axes"], summary["sharding"][path], strict=True)
        arrows = [f"{axis}->{'+'.join(mesh)}" if mesh else axis for axis, mesh in placed]
        local = shards[path].values() if shards else ()
        rows.append((path, parameter["shape"], parameter["count"], ", ".join(arrows), *local))
    return tables.table("parameters (weights are [in, out])", columns, rows, wraps=axes)


def _totals(summary: dict[str, Any]) -> list[tuple[str, object]]:
    train, at = summary["train_flops_per_token"], f"at {summary['sequence_length']:,}"
    rows = [
        ("total_params (main model)", summary["total_params"]),
        (
            "activated_params (per token; embedding and head included)",
            summary["activated_params"],
        ),
        (
            "mtp_params (MTP modules, without the shared embedding and head)",
            summary["mtp_params"],
        ),
        (f"training FLOPs per token {at}, causal, no MTP", _flops(train["causal"])),
        (f"training FLOPs per token {at}, full square, no MTP", _flops(train["full_square"])),
        (f"training FLOPs per token {at}, causal, with MTP", _flops(train["causal_with_mtp"])),
        (
            f"forward FLOPs per token {at}, causal, no MTP",
            _flops(summary["forward_flops_per_token"]),
        ),
        ("KV-cache bytes per token, bfloat16", summary["kv_cache_bytes_per_token"]),
    ]
    if "device" in summary:
        axes = [f"{axis}={size}" for axis, size in summary["mesh"].items() if size > 1]
        where = f"a device of mesh {' x '.join(axes)}" if axes else "the one device"
        rows += [
            (f"bytes of parameters on {where}", summary["device"]["bytes"]),
            (f"bytes of optimizer state on {where}", summary["device"]["optimizer_bytes"]),
        ]
        if "reference_bytes" in summary["device"]:
            reference = summary["device"]["reference_bytes"]
            rows.append((f"bytes of the reference policy on {where}", reference))
    return rows


def _flops(operations: int) -> str:
    return f"{operations / 1e9:,.2f} G" if operations >= 1e8 else f"{operations / 1e6:,.2f} M"

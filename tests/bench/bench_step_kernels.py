"""What a training step starts and moves on an H200, counted in the compiled program: no GPU is
needed, only its compiler (the extra `plan_gpu`).

The steps of bench_train_step on an H200: `small` and the 3B shape, in bfloat16, nothing computed
again in the backward pass; and `small` with isolated documents, and in FP8. Printed for each part
of the model: kernels, the bytes that kernels which multiply read and write, and those of all
others. Below them the bytes that are needed, and an estimate: the model's FLOPs at the rate of
products and the others' bytes at the rate of a copy, both as measured on an H200
(docs/records/h200_202611.md).

Run: JAX_PLATFORMS=cpu python -m tests.bench.bench_step_kernels [--json] [names]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp

from configs.small import config as SMALL
from dsjax.config import Config, ModelConfig
from dsjax.kernels.target import HOPPER
from dsjax.model.flops import train_flops_per_token
from dsjax.model.parameters import declarations
from dsjax.model.transformer import Transformer
from dsjax.plan import hopper, kernels, programs
from dsjax.plan.kernels import Kernel
from dsjax.precision.policy import Policy
from tests.bench.sides import MODEL_3B, case

PRODUCTS = 653e12  # FLOP/s, measured
COPY = 3.41e12  # bytes/s, read and written, measured on the same machine

# By the names of scopes; the first that is found counts.
SCOPES = "optimizer", "head", "router", "attention", "feed-forward", "experts", "norm", "embedding"


def cases() -> dict[str, Config]:
    small_model = dataclasses.replace(SMALL.model, n_mtp=0)
    small = case("small", small_model, 16, 2048, "bfloat16", "none")
    isolated = dataclasses.replace(small.data, isolate_documents=True)
    fp8 = dataclasses.replace(small.precision, fp8="on")
    return {
        "small": small,
        "3B": case("3B", MODEL_3B, 4, 4096, "bfloat16", "none"),
        "small_isolated": dataclasses.replace(small, data=isolated),
        "small_fp8": dataclasses.replace(small, precision=fp8),
    }


class Part(NamedTuple):
    """The kernels of one part of the step."""

    kernels: int = 0
    products: int = 0  # bytes of kernels that multiply matrices
    others: int = 0  # bytes of all others


class Counted(NamedTuple):
    name: str
    parts: dict[str, Part]
    waits: int  # for the host
    needed_state: int  # bytes of weights, gradients and moments
    needed_activations: int  # bytes of the operands and results of products
    estimate: float  # seconds, at least

    @property
    def total(self) -> Part:
        return Part(*map(sum, zip(*self.parts.values(), strict=True)))

    @property
    def needed(self) -> int:
        return self.needed_state + self.needed_activations


def part_of(kernel: Kernel) -> str:
    """Names the part of the step that a kernel belongs to."""
    if kernel.operation == "sort":
        return "sorting"
    inner, _, last = kernel.scope.rpartition("/")
    if last in ("dynamic_slice", "dynamic_update_slice") or not kernel.scope:
        return "stacks of layers"  # filled with zeros, written and read out a layer at a time
    if last == "slice" and inner.endswith("jvp()"):
        return "casts of layers' weights"  # as they are taken out of their stacks
    return next((name for name in SCOPES if name in kernel.scope), "other")


def multiplies(kernel: Kernel) -> bool:
    libraries = "cublas", "cudnn", "mosaic_gpu"
    if "gemm" in kernel.name or any(name in kernel.operation for name in libraries):
        return True
    # Triton kernels: of FP8, and of attention within documents.
    return any(name in kernel.scope for name in ("scaled_grouped", "document_attention"))


def products(model: ModelConfig, tokens: int) -> list[tuple[int, int, int]]:
    """Lists the matrix products of a forward pass: rows, and their widths before and after."""
    D, N, M = model.dim, model.n_heads, tokens
    H, W = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    Q, C, R = model.q_lora_rank, model.kv_lora_rank, model.qk_rope_head_dim
    queries = [(M, D, Q), (M, Q, N * H)] if Q else [(M, D, N * H)]
    keys = [(M, D, C + R), (M, C, N * (model.qk_nope_head_dim + W))]
    attention = [*queries, *keys, (M, N * W, D)]

    def swiglu(rows: int, hidden: int) -> list[tuple[int, int, int]]:
        return [(rows, D, hidden), (rows, D, hidden), (rows, hidden, D)]

    mixture = [
        *swiglu(M * model.n_activated_experts, model.moe_inter_dim),
        *swiglu(M, model.n_shared_experts * model.moe_inter_dim),
        (M, D, model.n_routed_experts),
    ]
    return [
        *attention * model.n_layers,
        *swiglu(M, model.inter_dim) * model.n_dense_layers,
        *mixture * model.n_moe_layers,
        (M, D, model.vocab_size),
    ]


def needed_activations(config: Config, tokens: int) -> int:
    """Bytes of each product's rows before and after, once for each of its three products, and of
    the attention's operands, results and gradients; all else could happen on the way.
    """
    model, size = config.model, jnp.dtype(config.precision.compute).itemsize
    moved = sum(3 * rows * (before + after) for rows, before, after in products(model, tokens))
    H, W = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    forward, backward = 2 * H + 2 * W, 4 * H + 4 * W
    moved += model.n_layers * tokens * model.n_heads * (forward + backward)
    return size * moved


def needed_state(config: Config) -> int:
    """Bytes per parameter: the compute type read in both passes and the gradient written; of the
    optimizer, weight, gradient and both moments read, and all but the gradient written.
    """
    parameters = declarations(Transformer(config.model, Policy(jnp.float32)))
    per_parameter = 2 * jnp.dtype(config.precision.compute).itemsize + 4 + 7 * 4
    return per_parameter * sum(parameter.count for parameter in parameters)


def count(name: str) -> Counted:
    config = cases()[name]
    mesh = hopper.mesh("H200")
    program = programs.train(config, mesh, HOPPER)
    run = kernels.read(hopper.compiled_text(program, mesh))
    parts: dict[str, Part] = defaultdict(Part)
    for kernel in run.runs():
        part, own = parts[part_of(kernel)], multiplies(kernel)
        parts[part_of(kernel)] = Part(
            part.kernels + 1,
            part.products + own * kernel.bytes,
            part.others + (not own) * kernel.bytes,
        )
    flops = train_flops_per_token(config.model, config.data.sequence_length) * program.tokens
    others = sum(part.others for part in parts.values())
    return Counted(
        name,
        dict(parts),
        run.waits,
        needed_state(config),
        needed_activations(config, program.tokens),
        flops / PRODUCTS + others / COPY,
    )


def show(counted: Counted) -> None:
    print(f"\n{counted.name}: {counted.waits} waits for the host\n")
    print("| part | kernels | GB, products | GB, others |")
    print("|---" * 4 + "|")
    by_bytes = sorted(counted.parts.items(), key=lambda item: -sum(item[1][1:]))
    for name, part in [*by_bytes, ("all", counted.total)]:
        print(f"| {name} | {part.kernels} ", end="")
        print(f"| {part.products / 1e9:.1f} | {part.others / 1e9:.1f} |")
    moved = counted.total.products + counted.total.others
    print(
        f"\nneeded: {counted.needed_state / 1e9:.1f} GB of weights, gradients, moments and ", end=""
    )
    print(f"{counted.needed_activations / 1e9:.1f} GB of activations; ", end="")
    print(f"moved / needed {moved / counted.needed:.2f}; ", end="")
    print(f"estimated {counted.estimate * 1e3:.0f} ms or more", flush=True)


def main() -> None:
    arguments = sys.argv[1:]
    names = [name for name in arguments if name != "--json"] or list(cases())
    if "--json" in arguments:
        counted = [count(name) for name in names]
        print(json.dumps([each._asdict() | {"total": each.total} for each in counted]))
        return
    print(f"jax {jax.__version__}, compiled for an H200")
    for name in names:
        show(count(name))


if __name__ == "__main__":
    main()

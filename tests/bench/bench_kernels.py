"""What decoding a token of the 3B shape starts and moves on an H100, counted in the compiled
program: no GPU is needed, only its compiler (the extra `plan_gpu`).

The model and the cache of bench_decode, batch 1, 8 and 32. Printed per token: kernels, and of them
those of one MoE layer; how often the host must read a value before the GPU goes on; the bytes that
kernels read and write, beside those that must be read, the activated parameters and the cache. Of a
call of 16 steps: what the host starts, by default, and with loops in command buffers.

Run: JAX_PLATFORMS=cpu python -m tests.bench.bench_kernels [--json] [batch sizes]
"""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import jax

from dsjax.config import ModelConfig
from dsjax.generate.decoding import MAX_STEPS
from dsjax.kernels.target import HOPPER
from dsjax.plan import hopper, kernels, launches, programs
from dsjax.train.step import declared_model
from tests.bench.bench_decode import NEW, PROMPT, bytes_read
from tests.bench.sides import MODEL_3B, case

BATCHES = 1, 8, 32
# What XLA puts into command buffers by default, as far as it matters here, and loops.
LOOPS_TOO = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,WHILE"}


class Counted(NamedTuple):
    """Of a program that decodes, per step."""

    batch: int
    kernels: int
    per_layer: int  # of the MoE layers
    waits: int  # for the host
    moved: int  # bytes
    needed: int  # bytes
    launches: int  # of a call of MAX_STEPS steps
    captured: int  # the same with loops in command buffers


def portions(model: ModelConfig, batch: int) -> dict[int, int]:
    """Says how many matrices of a stack a call of a kernel reads: of experts those that tokens
    choose, at most all of a layer; of anything else a layer's.
    """
    E = model.n_routed_experts
    chosen = min(batch * model.n_activated_experts, E)
    return {model.n_moe_layers * E: chosen, model.n_moe_layers: 1}


def count(batch: int) -> Counted:
    config = case("3B", MODEL_3B, batch, PROMPT + NEW, "bfloat16")
    mesh = hopper.mesh()
    declared = declared_model(config.model, config.precision, HOPPER)
    program = programs.decoding(declared, mesh, batch, PROMPT + NEW, "sequences")
    compiled = hopper.compiled(program, mesh)
    (steps,) = kernels.read(compiled.text, portions(MODEL_3B, batch)).loops
    (layers,) = (loop for loop in steps.body.loops if loop.trips == MODEL_3B.n_moe_layers)
    waits = steps.body.waits + (steps.trips is None)
    needed = int(bytes_read(config, batch, PROMPT + NEW / 2))
    starts = steps.body.starts
    launched, captured = (
        launches.read(each.thunks).starts(MAX_STEPS, MODEL_3B.n_moe_layers)
        for each in (compiled, hopper.compiled(program, mesh, LOOPS_TOO))
    )
    return Counted(
        batch, starts, layers.body.starts, waits, steps.body.bytes, needed, launched, captured
    )


def main() -> None:
    arguments = sys.argv[1:]
    batches = [int(text) for text in arguments if text != "--json"] or BATCHES
    counted = [count(batch) for batch in batches]
    if "--json" in arguments:
        print(json.dumps([each._asdict() for each in counted]))
        return
    print(f"jax {jax.__version__}, compiled for an H100")
    print("| batch | kernels | of a MoE layer | waits for the host ", end="")
    print("| GB moved | GB needed | ratio | starts of 16 steps | with loops captured |")
    print("|---" * 9 + "|")
    for each in counted:
        print(f"| {each.batch} | {each.kernels} | {each.per_layer} | {each.waits} ", end="")
        print(f"| {each.moved / 1e9:.2f} | {each.needed / 1e9:.2f} ", end="")
        print(f"| {each.moved / each.needed:.2f} | {each.launches} | {each.captured} |")


if __name__ == "__main__":
    main()

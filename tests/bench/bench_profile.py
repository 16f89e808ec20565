"""Where the time of a config's train step goes: by part of the model, and matrix products or not.

A traced run of real batches on one device; the time of each operation of the compiled program goes
to the innermost named scope that it comes from (`jax.named_scope` in `dsjax/model` and
`dsjax/train`), forward and backward pass and what is computed again alike. Operations that run
beside one another are each counted whole, so shares are of the time of all threads. Then the data
pipeline alone: its tokens/s against those that the step takes.

Run: python -m tests.bench.bench_profile [CONFIG] [--set key=value ...]; of configs/tiny.py unless
a config is given.
"""

from __future__ import annotations

import collections
import gzip
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax import command
from dsjax.data.loader import Loader
from dsjax.model.flops import train_flops_per_token
from dsjax.parallel.mesh import make_mesh
from dsjax.train import hyperparameters
from dsjax.train.loss import pretraining
from dsjax.train.optimizer import adamw
from dsjax.train.step import declared_model, initial_state, train_step
from dsjax.train.text import corpus_of, training_rows
from dsjax.train.throughput import measure_matmul_flops

PARTS = ("attention", "experts", "router", "feed-forward", "norm", "embedding", "head", "optimizer")
ROUNDS, BATCHES = 5, 200
# "  %name = type opcode(operands), ..., metadata={op_name="..."}"
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def parts_of(program: str) -> dict[str, tuple[str, bool]]:
    """For each instruction of a compiled program its part, and whether it is a matrix product."""
    parts = {}
    for line in program.splitlines():
        if not (instruction := _INSTRUCTION.match(line)) or instruction[2] in ("while", "call"):
            continue
        op_name = name[1] if (name := _OP_NAME.search(line)) else ""
        scopes = [word for word in re.split(r"[^\w-]+", op_name) if word in PARTS]
        product = instruction[2] == "dot" or op_name.endswith("dot_general")
        parts[instruction[1]] = (scopes[-1] if scopes else "other", product)
    return parts


def traced(run: Any) -> dict[str, float]:
    """Seconds of each operation of the program in one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    seconds: dict[str, float] = collections.defaultdict(float)
    for event in events:
        if event.get("ph") == "X":
            seconds[event["name"]] += event["dur"] / 1e6
    return seconds


def main() -> None:
    parser = command.make_parser(__doc__)
    command.add_config(parser, default="configs/tiny.py")
    config = command.load(parser.parse_args())

    mesh = make_mesh({"data": 1}, n_devices=1)
    declared, optimizer = declared_model(config.model, config.precision), adamw(config.optim)
    state = initial_state(declared, optimizer, mesh, config.train.seed)
    loader = Loader(training_rows(config, corpus_of(config)))
    size = hyperparameters.batch_size(config.train, 0)
    tokens = size * config.data.sequence_length

    def take() -> dict[str, np.ndarray]:
        rows = config.micro_batch_size
        return {
            name: array.reshape(size // rows, rows, -1) for name, array in loader.take(size).items()
        }

    knobs = {name: np.float32(value) for name, value in hyperparameters.knobs(config, 0).items()}
    start = time.perf_counter()
    step = jax.jit(train_step(declared, optimizer, pretraining(config)), donate_argnums=0)
    step = step.lower(state, take(), knobs).compile()
    compile_seconds = time.perf_counter() - start

    def run() -> float:
        nonlocal state
        batch = take()
        start = time.perf_counter()
        state, metrics = step(state, batch, knobs)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    run()
    step_seconds = statistics.median(run() for _ in range(ROUNDS))
    parts = parts_of(str(step.as_text()))
    table: dict[str, list[float]] = {part: [0.0, 0.0] for part in (*PARTS, "other")}
    for name, seconds in traced(run).items():
        if name in parts:
            part, product = parts[name]
            table[part][product] += seconds
    total = sum(map(sum, table.values()))
    limit = train_flops_per_token(config.model, config.data.sequence_length) * tokens
    limit /= measure_matmul_flops(4096)

    loader.take(size)
    start = time.perf_counter()
    for _ in range(BATCHES):
        loader.take(size)
    data_seconds = (time.perf_counter() - start) / BATCHES
    loader.close()

    print(
        f"{config.name}, jax {jax.__version__} on {jax.default_backend()}, {os.cpu_count()} cores"
    )
    print(f"compiling {compile_seconds:.1f} s; step {step_seconds:.3f} s, {tokens} tokens; "
          f"model FLOPs at the rate of a 4096 x 4096 float32 product {limit:.3f} s")  # fmt: skip
    print(f"{'part':14}{'products':>10}{'rest':>10}   share of all threads' time")
    for part, (rest, product) in table.items():
        print(f"{part:14}{product / total:>10.1%}{rest / total:>10.1%}")
    rest, product = (sum(times) for times in zip(*table.values(), strict=True))
    print(f"{'all':14}{product / total:>10.1%}{rest / total:>10.1%}   of {total:.2f} s")
    print(f"data pipeline: {tokens / data_seconds:,.0f} tokens/s, "
          f"{step_seconds / data_seconds:.0f} times what the step takes")  # fmt: skip


if __name__ == "__main__":
    main()

"""What emulating FP8 adds to a train step on this machine.

One optimizer step of `configs/tiny.py`, all of it, in each compute type without FP8 and with both
kinds of scales. The programs take turns in one process, so that a noisy neighbour hits all; the
ratios are of medians, to the same compute type without FP8.

Run: make bench, or python -m tests.bench.bench_fp8_step
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from configs.tiny import config as TINY
from dsjax.config import Config, PrecisionConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.train.step import initial_state, train_step

ROUNDS = 7
COMPUTE = ("float32", "bfloat16")
FP8 = {"off": {}, "pow2": {"fp8": "on", "fp8_scale": "pow2"}, "fp32": {"fp8": "on"}}


def step_of(config: Config) -> Callable[[], float]:
    """A step on one device and random tokens; returns the loss."""
    state = initial_state(config, make_mesh({"data": 1}, n_devices=1))
    step = jax.jit(train_step(config), donate_argnums=0)
    shape = (1, config.train.batch_size, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    batch = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.ones(shape, jnp.int32)}
    knobs = {"learning_rate": 1e-4, "mtp_weight": 0.3, "bias_update_speed": 1e-3}
    knobs = {name: jnp.float32(value) for name, value in knobs.items()}

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch, knobs)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return run


def median_seconds(
    functions: dict[str, Callable[[], float]], rounds: int = ROUNDS
) -> dict[str, float]:
    """Runs the functions in turns, the first round not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def main() -> None:
    print(f"jax {jax.__version__} on {jax.default_backend()}, {os.cpu_count()} cores, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}")
    for compute in COMPUTE:
        steps = {
            kind: step_of(
                dataclasses.replace(TINY, precision=PrecisionConfig(compute=compute, **fields))
            )
            for kind, fields in FP8.items()
        }
        seconds = median_seconds(steps)
        for kind, median in seconds.items():
            ratio = median / seconds["off"]
            print(f"compute {compute:8}, fp8 {kind:4}: {median:.3f} s a step, {ratio:.2f}x")


if __name__ == "__main__":
    main()

"""Train step of the V3 architecture against Hugging Face transformers, on this machine, in one run.

On a CPU 80M parameters (width 512, 6 layers of which 1 dense, 32 experts top-4 in 4 groups keeping
2), batch 4 x 512, float32; on an accelerator `configs/small.py` and a shape of 3B parameters, in
bfloat16. AdamW, no MTP, dropless on both sides, natural routing of an untrained model, random
tokens. On a CPU the sides take turns; on an accelerator, where both would not fit into memory, each
runs in a process of its own, one after the other. The ratio of medians is printed. The limit is the
time that this machine's rate of large matrix products in the same type would need for the model's
FLOPs (causal attention counted once), and each side's share of it is its MFU against what was
measured. Memory is that of a process that runs one side alone: on a CPU weights, optimizer,
activations, libraries, and the compiler at work; on an accelerator the most that was allocated.

Run: make bench, after `pip install -e '.[reference]'` for the Hugging Face side. It runs outside
pytest, whose configuration here trades speed for quick compilation.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.config import Config
from dsjax.model.flops import train_flops_per_token
from dsjax.train.throughput import measure_matmul_flops
from tests.bench.sides import (
    Step,
    cases,
    dsjax_step,
    machine,
    median_seconds,
    seconds,
    transformers_runs_here,
    transformers_step,
)

ROUNDS = 7
SIDES = {"dsjax": dsjax_step, "transformers": transformers_step}


class Alone(NamedTuple):
    """What a process measures that runs one side and does nothing else."""

    first: float  # seconds of the first step, with compilation
    median: float  # seconds of the others
    peak: int  # bytes


def alone(make: Callable[[Config], Step], config: Config, rounds: int) -> Alone:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (make, config, rounds))


def _measure(make: Callable[[Config], Step], config: Config, rounds: int) -> Alone:
    step = make(config)
    first = seconds(step)
    return Alone(first, median_seconds({"": step}, rounds)[""], _peak_bytes())


def _peak_bytes() -> int:
    if jax.default_backend() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ours = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    torch = sys.modules.get("torch")
    return max(ours, torch.cuda.max_memory_allocated() if torch else 0)


def compare(config: Config) -> None:
    length = config.data.sequence_length
    tokens = config.train.batch_size * length
    on_cpu = jax.default_backend() == "cpu"
    sides = SIDES if transformers_runs_here() else {"dsjax": dsjax_step}
    measured = {name: alone(make, config, 2 if on_cpu else ROUNDS) for name, make in sides.items()}
    median = {name: side.median for name, side in measured.items()}
    if on_cpu:  # its speed changes from minute to minute
        median = median_seconds({name: make(config) for name, make in sides.items()}, ROUNDS)
    rate = measure_matmul_flops(4096 if on_cpu else 8192, jnp.dtype(config.precision.compute))
    limit = train_flops_per_token(config.model, length) * tokens / rate
    print(f"{config.name}, {tokens} tokens of {length}, {config.precision.compute}, ", end="")
    print(f"remat={config.train.remat}:")
    print(f"  first step, with compilation, {measured['dsjax'].first:.1f} s; ", end="")
    print(f"products at {rate / 1e12:.3g} TFLOP/s")
    for name, taken in [*median.items(), ("limit", limit)]:
        print(f"  {name:13} {taken:.3f} s a step, {tokens / taken:.0f} tokens/s", end="")
        print(f", {limit / taken:.1%} of the limit", end="")
        print(f", {measured[name].peak / 1e9:.2f} GB" if name in measured else "")
    if "transformers" in median:
        ratio = median["transformers"] / median["dsjax"]
        print(f"  dsjax / transformers: {ratio:.2f}x the tokens/s", flush=True)


def main() -> None:
    print(machine())
    for config in cases():
        compare(config)


if __name__ == "__main__":
    main()

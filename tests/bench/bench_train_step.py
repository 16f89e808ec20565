"""Train step of the V3 architecture against Hugging Face transformers, on this machine, in one run.

On a CPU 80M parameters (width 512, 6 layers of which 1 dense, 32 experts top-4 in 4 groups keeping
2), batch 4 x 512, float32; on an accelerator `configs/small.py` and a shape of 3B parameters, in
bfloat16. AdamW, no MTP, dropless on both sides, natural routing of an untrained model, random
tokens. The sides take turns; the ratio of medians is printed. The limit is the time that this
machine's rate of large matrix products in the same type would need for the model's FLOPs (causal
attention counted once), and each side's share of it is its MFU against what was measured. On a CPU
the memory of a process that runs one side alone is printed too: weights, optimizer, activations,
libraries, and the compiler at work.

Run: make bench, after `pip install -e '.[reference]'` for the Hugging Face side. It runs outside
pytest, whose configuration here trades speed for quick compilation.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable

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


def peak_bytes(make: Callable[[Config], Step], config: Config) -> int:
    """What a process holds at most that takes a few steps of one side and does nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_steps_alone, (make, config))


def _steps_alone(make: Callable[[Config], Step], config: Config) -> int:
    step = make(config)
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(config: Config) -> None:
    length = config.data.sequence_length
    tokens = config.train.batch_size * length
    on_cpu = jax.default_backend() == "cpu"
    sides = SIDES if transformers_runs_here() else {"dsjax": dsjax_step}
    peaks = {name: peak_bytes(make, config) for name, make in sides.items()} if on_cpu else {}
    steps = {name: make(config) for name, make in sides.items()}
    first = seconds(steps["dsjax"])
    median = median_seconds(steps, ROUNDS)
    rate = measure_matmul_flops(4096 if on_cpu else 8192, jnp.dtype(config.precision.compute))
    limit = train_flops_per_token(config.model, length) * tokens / rate
    print(f"{config.name}, {tokens} tokens of {length}, {config.precision.compute}:")
    print(f"  first step, with compilation, {first:.1f} s; products at {rate / 1e12:.3g} TFLOP/s")
    for name, taken in [*median.items(), ("limit", limit)]:
        print(f"  {name:13} {taken:.3f} s a step, {tokens / taken:.0f} tokens/s", end="")
        print(f", {limit / taken:.0%} of the limit", end="")
        print(f", a process of {peaks[name] / 1e9:.2f} GB" if name in peaks else "")
    if "transformers" in median:
        ratio = median["transformers"] / median["dsjax"]
        print(f"  dsjax / transformers: {ratio:.2f}x the tokens/s")


def main() -> None:
    print(machine())
    for config in cases():
        compare(config)


if __name__ == "__main__":
    main()

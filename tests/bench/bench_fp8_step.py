"""What emulating FP8 adds to a train step on this machine.

One optimizer step of `configs/tiny.py`, all of it, in each compute type without FP8 and with both
kinds of scales. The programs take turns in one process, so that a noisy neighbour hits all; the
ratios are of medians, to the same compute type without FP8.

Run: make bench, or python -m tests.bench.bench_fp8_step
"""

from __future__ import annotations

import dataclasses
import os

from configs.tiny import config as TINY
from dsjax.config import PrecisionConfig
from tests.bench.sides import dsjax_step, machine, median_seconds

ROUNDS = 7
COMPUTE = ("float32", "bfloat16")
FP8 = {"off": {}, "pow2": {"fp8": "on", "fp8_scale": "pow2"}, "fp32": {"fp8": "on"}}


def main() -> None:
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}")
    for compute in COMPUTE:
        steps = {
            kind: dsjax_step(
                dataclasses.replace(TINY, precision=PrecisionConfig(compute=compute, **fields))
            )
            for kind, fields in FP8.items()
        }
        seconds = median_seconds(steps, ROUNDS)
        for kind, median in seconds.items():
            ratio = median / seconds["off"]
            print(f"compute {compute:8}, fp8 {kind:4}: {median:.3f} s a step, {ratio:.2f}x")


if __name__ == "__main__":
    main()

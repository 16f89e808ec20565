"""How fast a run is: tokens per second, seconds per step, and model FLOPs utilization (MFU).

MFU = training FLOPs of the model / (seconds * peak FLOP/s of all devices). The FLOPs are those of
dsjax.model.flops: causal attention and MTP count, recomputation does not. The peak is the vendor's
dense bfloat16 figure; for a device that is not in the table, such as a CPU, it is the measured rate
of a large matrix product.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Dense bfloat16 FLOP/s per device, by prefix of its device_kind; the first match counts.
_PEAKS = (
    ("TPU7x", 2307e12 / 2),  # each of a chip's two cores is a JAX device
    ("TPU v6", 918e12),
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA H200", 989.5e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989.5e12),
    ("NVIDIA A100", 312e12),
)


class Peak(NamedTuple):
    """FLOP/s of all devices together, and where the figure comes from."""

    flops: float
    source: str


class Rates(NamedTuple):
    """Rates over several steps."""

    tokens_per_second: float
    step_seconds: float
    mfu: float


def peak_flops(devices: Sequence[Any]) -> Peak:
    """Returns the peak of JAX devices together."""
    kind = devices[0].device_kind
    for prefix, flops in _PEAKS:
        if kind.startswith(prefix):
            return Peak(
                flops * len(devices), f"{len(devices)} x {kind}, dense bfloat16, as published"
            )
    measured = measure_matmul_flops()
    if devices[0].platform == "cpu":  # all CPU devices of a process share its cores
        count = len({device.process_index for device in devices})
        where = "this CPU" if count == 1 else f"one of {count} processes' CPU"
        return Peak(
            measured * count,
            f"float32 matrix product measured on {where}, {measured / 1e9:.0f} GFLOP/s",
        )
    return Peak(
        measured * len(devices), f"{len(devices)} x {kind}, float32 matrix product measured"
    )


def measure_matmul_flops(size: int = 1536, dtype: DTypeLike = jnp.float32) -> float:
    """Returns the FLOP/s of a square matrix product on the default device, the best of five."""
    # Random values: zeros and ones draw less power, which lets some devices run faster.
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


class Meter:
    """Times steps, each from the end of the previous one, what it takes from its source included.

    Evaluating and saving are left out, because `start` is called after them, and what happens
    under `left_out`, such as compiling.
    """

    def __init__(self, *, flops_per_token: float, peak: Peak):
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._seconds: list[float] = []
        self._tokens: list[int] = []
        self._taken = 0
        self._last = time.perf_counter()

    def start(self) -> None:
        """Starts the clock of the next step."""
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Stops the clock of the step that is under way."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - began

    def step(self, tokens: int) -> None:
        """Records that a step of `tokens` tokens has ended."""
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._tokens.append(tokens)
        self._last = now

    def take(self) -> Rates:
        """Returns the mean rates of the steps since the last call."""
        rates = self._rates(self._taken)
        self._taken = len(self._seconds)
        return rates

    def whole(self) -> Rates | None:
        """Returns the rates of all steps, with the median `step_seconds`; None before the first."""
        if not self._seconds:
            return None
        return self._rates(0)._replace(step_seconds=statistics.median(self._seconds))

    def _rates(self, first: int) -> Rates:
        seconds = sum(self._seconds[first:])
        tokens_per_second = sum(self._tokens[first:]) / seconds
        return Rates(
            tokens_per_second=tokens_per_second,
            step_seconds=seconds / len(self._seconds[first:]),
            mfu=tokens_per_second * self._flops_per_token / self._peak.flops,
        )

"""How fast a run is: tokens per second, seconds per step, and model FLOPs utilization (MFU).

MFU = training FLOPs of the model / (seconds * peak FLOP/s of all devices). The FLOPs are those of
dsjax.model.flops: causal attention and MTP count, recomputation does not. The peak is the vendor's
dense bfloat16 figure; for a device that is not in the table, such as a CPU, it is the measured rate
of a large matrix product.
"""

from __future__ import annotations

import collections
import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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
# Metrics that tell how fast a run was, not what it learned: two equal runs differ in them.
TIMED = (
    "tokens_per_second", "step_seconds", "data_seconds", "mfu", "wall_seconds", "memory_bytes",
)  # fmt: skip
_NEWEST = 1000  # steps that the median is of


class Peak(NamedTuple):
    """FLOP/s of all devices together, and where the figure comes from."""

    flops: float
    source: str


class Rates(NamedTuple):
    """Rates over several steps."""

    tokens_per_second: float
    step_seconds: float
    data_seconds: float  # of them, per step, spent waiting for what the step trains on
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


def peak_bytes(devices: Sequence[Any]) -> int:
    """Returns the most memory that was ever in use, in bytes: on the fullest of these devices or,
    where devices do not say, as CPUs do not, by this process.
    """
    known = [device.memory_stats() or {} for device in devices]
    peaks = [statistics["peak_bytes_in_use"] for statistics in known if statistics]
    if peaks:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Sum(NamedTuple):
    """What some steps took together."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds
    capacity: float = 0.0  # FLOP that the devices could have done in the time

    def plus(self, other: _Sum) -> _Sum:
        return _Sum(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.waited + other.waited,
            self.capacity + other.capacity,
        )


class Meter:
    """Times steps, each from the end of the previous one, what it takes from its source included.

    Evaluating and saving are left out, because `start` is called after them, and what happens
    under `left_out`, such as compiling.
    """

    def __init__(
        self, *, flops_per_token: float, peak: Peak, before: Mapping[str, Any] | None = None
    ):
        """
        Args:
          before: the `state` of an earlier session of the run, whose steps `whole` includes.
        """
        self._flops_per_token, self._peak = flops_per_token, peak
        self._all = _Sum(**before["sums"]) if before else _Sum()
        self._newest = collections.deque(before["newest"] if before else [], _NEWEST)
        self._since = _Sum()
        self._waited = 0.0
        self._last = time.perf_counter()

    def start(self) -> None:
        """Starts the clock of the next step."""
        self._waited, self._last = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Stops the clock of the step that is under way."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    def step(self, tokens: int) -> None:
        """Records that a step of `tokens` tokens has ended."""
        now = time.perf_counter()
        seconds = now - self._last
        taken = _Sum(1, tokens, seconds, self._waited, seconds * self._peak.flops)
        self._all, self._since = self._all.plus(taken), self._since.plus(taken)
        self._newest.append(seconds)
        self._waited, self._last = 0.0, now

    def take(self) -> Rates:
        """Returns the mean rates of the steps since the last call."""
        rates, self._since = self._rates(self._since), _Sum()
        return rates

    def whole(self) -> Rates | None:
        """Returns the rates of all steps, earlier sessions' included, with the median
        `step_seconds` of the newest thousand; None before the first.
        """
        if not self._all.steps:
            return None
        return self._rates(self._all)._replace(step_seconds=statistics.median(self._newest))

    def state(self) -> dict[str, Any]:
        """Returns as JSON what another session's meter goes on from."""
        return {"sums": self._all._asdict(), "newest": list(self._newest)}

    def _rates(self, taken: _Sum) -> Rates:
        return Rates(
            tokens_per_second=taken.tokens / taken.seconds,
            step_seconds=taken.seconds / taken.steps,
            data_seconds=taken.waited / taken.steps,
            mfu=taken.tokens * self._flops_per_token / taken.capacity,
        )

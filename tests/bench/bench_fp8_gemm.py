"""Block-scaled FP8 products at DeepGEMM's published shapes against bfloat16, on this machine.

Operands are quantised beforehand, as for a figure of the product alone. Three ways, in turns:
bfloat16 operands; the scaled product that training runs where the device has units for E4M3, on a
Hopper a kernel, elsewhere `scaled_matmul` with the machine's own E4M3 product; and one E4M3 product
without scales, which is no answer but the limit of any with them. The chip's limits are the rates
of square products of both types in the same run. Each scaled product is compared with the float32
reference before it is timed.

On a machine without E4M3 units the shapes are small ones, to show that the benchmark works.

Run: python -m tests.bench.bench_fp8_gemm
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.kernels import hopper_scaled
from dsjax.kernels.fp8_gemm import e4m3_product, scaled_matmul
from dsjax.kernels.target import Target
from dsjax.precision.fp8 import CHANNEL_TILE, E4M3, TOKEN_TILE, WEIGHT_BLOCK, quantize_block
from dsjax.precision.hopper_quantize import quantize_rows
from tests.closeness import relative_l2

ROWS = (64, 128, 4096)
WEIGHTS = ((7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168))
LARGE = 8192
SMALL_ROWS, SMALL_WEIGHTS, SMALL_LARGE = (64,), ((512, 200), (256, 384)), 256
ROUNDS, CALLS = 5, 10
BOTH = CHANNEL_TILE, TOKEN_TILE

Product = Callable[[], Any]


def products(m: int, k: int, n: int) -> dict[str, Product]:
    """The three ways, as programs that are compiled and have their operands."""
    x_MK = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    w_KN = jax.random.normal(jax.random.key(1), (k, n), jnp.bfloat16)
    x, w = quantize_block(x_MK, CHANNEL_TILE), quantize_block(w_KN, WEIGHT_BLOCK)
    scales_XN = jnp.repeat(w.scales, w.block[1], axis=1)[:, :n]

    def by_slices(x, scales_MX, w, scales_XN):
        out_MN = scaled_matmul(x, scales_MX, w, scales_XN, product=e4m3_product)
        return out_MN.astype(jnp.bfloat16)

    given = x.values, x.scales, w.values, scales_XN
    scaled, operands = by_slices, given
    if Target.here().is_hopper:
        scaled = functools.partial(hopper_scaled.matmul, dtype=jnp.bfloat16)
        operands = x.values, x.scales, w.values.mT, scales_XN.mT
    error = relative_l2(jax.jit(scaled)(*operands), jax.jit(scaled_matmul)(*given))
    if error > 5e-3:  # the result's own rounding and a 14-bit accumulator's
        raise SystemExit(f"{m} x {k} x {n}: {error:.2e} from the reference")
    ways = {
        "bf16": (jnp.matmul, (x_MK, w_KN)),
        "scaled e4m3": (scaled, operands),
        "e4m3 without scales": (
            lambda x, w: e4m3_product(x, w).astype(jnp.bfloat16),
            (x.values, w.values),
        ),
    }
    return {name: bind(function, arguments) for name, (function, arguments) in ways.items()}


def quantising(m: int, k: int) -> dict[str, Product]:
    """A gradient quantised for both of its products, as those read it, by XLA and, on a Hopper, by
    the kernel of training.
    """

    def lying(x, tokens):
        return x.values, x.scales.T, tokens.values.mT, tokens.scales

    def by_xla(x_MK):
        return lying(*(quantize_block(x_MK, block) for block in BOTH))

    def by_kernel(x_MK):
        return lying(*quantize_rows(x_MK, blocks=BOTH, scale="fp32"))

    ways = {"XLA": by_xla} | ({"kernel": by_kernel} if Target.here().is_hopper else {})
    x_MK = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    return {name: bind(function, (x_MK,)) for name, function in ways.items()}


def bind(function: Callable[..., Any], arguments: tuple[jax.Array, ...]) -> Product:
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: compiled(*arguments)


def rates(ways: dict[str, Product], amount: float) -> dict[str, float]:
    """The amount per second of each, FLOPs or bytes; the median of rounds in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, product in ways.items():
            start = time.perf_counter()
            for _ in range(CALLS - 1):
                product()
            jax.block_until_ready(product())
            seconds[name].append((time.perf_counter() - start) / CALLS)
    return {name: amount / statistics.median(times[1:]) for name, times in seconds.items()}


def limits(size: int) -> dict[str, float]:
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    ways = {
        "bf16": bind(jnp.matmul, (x, x)),
        "e4m3": bind(
            lambda x, y: e4m3_product(x, y).astype(jnp.bfloat16), (x.astype(E4M3), x.astype(E4M3))
        ),
    }
    return rates(ways, 2.0 * size**3)


def main() -> None:
    device = jax.devices()[0]
    full = Target.of(device).multiplies_e4m3
    large = LARGE if full else SMALL_LARGE
    limit = limits(large)
    print(f"jax {jax.__version__} on {device.device_kind}; {large}^3: ", end="")
    print(", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in limit.items()))
    print("| m | k | n | bf16 | scaled e4m3 | e4m3 without scales | scaled / bf16 | of the limit |")
    print("|---" * 8 + "|")
    for m in ROWS if full else SMALL_ROWS:
        for k, n in WEIGHTS if full else SMALL_WEIGHTS:
            rate = rates(products(m, k, n), 2.0 * m * k * n)
            shown = " | ".join(f"{value / 1e12:.3g}" for value in rate.values())
            scaled = rate["scaled e4m3"]
            print(f"| {m} | {k} | {n} | {shown} ", end="")
            print(f"| {scaled / rate['bf16']:.2f}x | {scaled / limit['e4m3']:.1%} |", flush=True)


if __name__ == "__main__":
    main()

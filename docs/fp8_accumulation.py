"""What a tensor core's short accumulator costs, and what promotion to float32 buys back.

Multiplies random E4M3 matrices with a model of the unit (`tests/oracles/tensor_core.py`), promoting
partial sums every N_C elements of K, and compares with float64. Writes the table and the plot that
`fp8_accumulation.md` shows.

Command: python docs/fp8_accumulation.py     (three minutes on 2 CPU cores)
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from dsjax.kernels.fp8_gemm import scaled_matmul
from tests.oracles.tensor_core import tensor_core_product

SIDE = 256  # rows and columns of the product
LENGTHS = (512, 1024, 2048, 4096, 8192)
PROMOTE_EVERY = (32, 64, 128, 256, 512, None)  # None: never
KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform on [0, 1)": lambda rng, shape: rng.uniform(size=shape),
}


def error(kind: str, length: int, promote_every: int | None) -> float:
    """The largest error of an element, relative to the product's root mean square."""
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(KINDS[kind](rng, shape), jnp.float8_e4m3fn)
        for shape in [(SIDE, length), (length, SIDE)]
    )
    slice_size = promote_every or length
    ones = jnp.ones((SIDE, length // slice_size))
    multiply = jax.jit(
        lambda a, b: scaled_matmul(
            a, ones, b, ones.T, promote_every=slice_size, product=tensor_core_product
        )
    )
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    return float(np.abs(np.asarray(multiply(a, b)) - want).max() / np.sqrt(np.mean(want**2)))


def main() -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, kind in zip(panels, KINDS, strict=True):
        print(f"\n{kind}\n\n| N_C | " + " | ".join(f"K = {length}" for length in LENGTHS) + " |")
        print("|---" * (len(LENGTHS) + 1) + "|")
        for promote_every in PROMOTE_EVERY:
            errors = [error(kind, length, promote_every) for length in LENGTHS]
            label = f"{promote_every}" if promote_every else "never"
            print(f"| {label} | " + " | ".join(f"{e:.3%}" for e in errors) + " |", flush=True)
            panel.loglog(LENGTHS, errors, marker="o", label=f"N_C = {label}")
        panel.set(title=kind, xlabel="K", xticks=LENGTHS, xticklabels=map(str, LENGTHS))
        panel.minorticks_off()
    panels[0].set_ylabel("largest error / rms of the product")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()

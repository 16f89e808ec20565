"""FP8 training against bfloat16 training, same seed, same batches.

Trains the variants of two models one after the other, as `tools/train.py` would, in folders of
their own under RUNS; what is finished there already is not trained again, and a run that was
stopped is compared as far as it came. Then writes the plot and prints the tables that
`fp8_training.md` shows.

The measure is the report's: losses smoothed with an exponential moving average of coefficient 0.9,
their difference relative to bfloat16's. The variant "128 x 128" tries what the report found to
diverge: activation gradients in 128 x 128 blocks, as weights have them, where they enter the input
gradient. "forward" rounds what enters the forward products alone, which says where a difference
comes from.

Command: python docs/fp8_training.py RUNS [MODEL/VARIANT ...]     (what to train; all by default)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dsjax import settings
from dsjax.config import Config
from dsjax.parallel import compilation
from dsjax.precision import matmul
from dsjax.precision.fp8 import TOKEN_TILE, WEIGHT_BLOCK
from dsjax.train import pretraining

BRIEF = [
    "train.log_every=1",
    "train.eval_every=0",
    "train.eval_sequences=8",
    "train.checkpoint_every=0",
]
MODELS = {
    "tiny": (  # at a quarter of its learning rate: at its own, two bfloat16 runs part by 0.4 %
        "configs/tiny.py",
        ["train.steps=150", "optim.learning_rate=5e-4", "train.remat=selective", *BRIEF],
    ),
    "small": (  # its layers, three of the twelve, shorter text, and half its learning rate
        "configs/small.py",
        [
            "model.n_layers=3",
            "model.vocab_size=4096",
            "data.sequence_length=256",
            "train.steps=60",
            "train.batch_size=2",
            "train.micro_batch_size=0",
            "train.bias_update_speed=0.01",
            "optim.learning_rate=3e-4",
            "optim.warmup_steps=15",
            *BRIEF,
        ],
    ),
}
MODELS |= {  # tiny at its own rate, several seeds: there one pair of runs says little
    f"tiny-seed{seed}": ("configs/tiny.py", ["train.steps=200", f"train.seed={seed}", *BRIEF])
    for seed in (1, 2, 3)
}
PANELS = {"tiny": ["tiny"], "small": ["small"], "tiny at its own rate": [*MODELS][2:]}
VARIANTS = {
    "bf16": ["precision.compute=bfloat16"],
    # The same arithmetic in programs of other roundings: what chance makes of a run.
    "bf16-again": ["precision.compute=bfloat16", "train.remat=selective"],
    "float32": ["precision.compute=float32"],
    "fp8-pow2": ["precision.compute=bfloat16", "precision.fp8=on", "precision.fp8_scale=pow2"],
    "fp8-fp32": ["precision.compute=bfloat16", "precision.fp8=on", "precision.fp8_scale=fp32"],
    "fp8-128x128": ["precision.compute=bfloat16", "precision.fp8=on", "precision.fp8_scale=pow2"],
    "fp8-forward": ["precision.compute=bfloat16", "precision.fp8=on", "precision.fp8_scale=pow2"],
}


def _of_the_forward_pass(x, block, policy, turned=False, operand=matmul._operand):
    return x.astype(policy.compute) if block == TOKEN_TILE else operand(x, block, policy, turned)


CHANGES = {  # of `dsjax.precision.matmul`
    "fp8-128x128": {"GRADIENT_TILE": WEIGHT_BLOCK},
    "fp8-forward": {"GRADIENT_TILE": TOKEN_TILE, "_operand": _of_the_forward_pass},
}
SMOOTHING = 0.9
CLAIM = 0.0025


def config_of(model: str, variant: str) -> Config:
    path, changes = MODELS[model]
    return settings.override(settings.load_config(path), changes + VARIANTS[variant])


def train(model: str, variant: str, folder: Path) -> None:
    config = config_of(model, variant)
    compilation.use_persistent_cache(config.data.cache_dir)
    changes = {"GRADIENT_TILE": matmul.GRADIENT_TILE} | CHANGES.get(variant, {})
    with mock.patch.multiple(matmul, **changes):
        code = pretraining.train(config, folder, command=f"python {__file__} {folder.parents[1]}")
    if code:
        raise SystemExit(code)


def losses(folder: Path) -> np.ndarray:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if "loss" in line])


def smooth(values: np.ndarray) -> np.ndarray:
    smoothed = [values[0]]
    for value in values[1:]:
        smoothed.append(SMOOTHING * smoothed[-1] + (1 - SMOOTHING) * value)
    return np.array(smoothed)


def gaps(runs: Path, model: str) -> dict[str, np.ndarray]:
    """Each variant's relative difference from bfloat16, as far as both have been trained."""
    curves = {
        variant: smooth(losses(runs / model / variant))
        for variant in VARIANTS
        if (runs / model / variant / "metrics.jsonl").is_file()
    }
    want = curves.pop("bf16", np.zeros(0))
    steps = {variant: min(len(curve), len(want)) for variant, curve in curves.items()}
    return {variant: curves[variant][:n] / want[:n] - 1 for variant, n in steps.items() if n}


def report(runs: Path) -> None:
    figure, panels = plt.subplots(1, len(PANELS), figsize=(15, 4))
    for panel, (title, models) in zip(panels, PANELS.items(), strict=True):
        labelled: set[str] = set()
        for model in models:
            print(f"\n{model}\n")
            print("| variant | steps | largest | mean | at the end |\n|---|---|---|---|---|")
            for variant, gap in gaps(runs, model).items():
                size = np.abs(gap)
                print(
                    f"| {variant} | {len(gap)} | {size.max():.3%} | {gap.mean():+.3%} "
                    f"| {gap[-1]:+.3%} |"
                )
                color = f"C{[*VARIANTS].index(variant)}"
                label = None if variant in labelled else variant
                panel.plot(100 * gap, label=label, color=color, linewidth=1)
                labelled.add(variant)
        panel.axhspan(-100 * CLAIM, 100 * CLAIM, color="grey", alpha=0.15)
        panel.set(title=title, xlabel="step")
        panel.legend()
    panels[0].set_ylabel("EMA(0.9) loss against bf16, %")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("which", nargs="*")
    arguments = parser.parse_args()
    everything = [f"{model}/{variant}" for model in MODELS for variant in VARIANTS]
    for name in arguments.which or everything:
        model, variant = name.split("/")
        train(model, variant, arguments.runs / name)
    report(arguments.runs)


if __name__ == "__main__":
    main()

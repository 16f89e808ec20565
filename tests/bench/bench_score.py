"""Scoring given tokens with the V3 architecture against Hugging Face transformers, on this machine,
in one run.

The models and types of bench_train_step, random weights and tokens: the negative log-likelihood of
each token of 4 rows of 512 and of one of 2,048, as `tools/score.py` and the likelihoods of
`tools/evaluate.py` compute it; on the other side a forward pass without gradients, and torch's
cross-entropy of its logits. Times are of the processor, which other work disturbs less than the
clock's; the sides take turns and the medians are printed.

Run: python -m tests.bench.bench_score, after `pip install -e '.[reference]'` for the Hugging Face
side.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config
from dsjax.infer.score import Scorer, score_text
from dsjax.infer.windows import Text
from dsjax.model.parameters import initialize
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from tests.bench.sides import (
    cases,
    machine,
    median_seconds,
    transformers_model,
    transformers_runs_here,
)

SHAPES = ((4, 512), (1, 2048))
ROUNDS = 6

Nats = Callable[[], float]


def dsjax_score(config: Config, tokens_BT: np.ndarray) -> Nats:
    declared = Transformer(config.model, Policy(jnp.dtype(config.precision.compute)))
    model = jax.jit(lambda key: initialize(declared, key))(jax.random.key(0))
    rows, length = tokens_BT.shape
    scorer, text = Scorer(model, rows=rows), Text(list(tokens_BT), 0)

    def run() -> float:
        return score_text(scorer, text, length=length).nats

    return run


def transformers_score(config: Config, tokens_BT: np.ndarray) -> Nats:
    model = transformers_model(config, use_cache=False).eval()
    import torch

    model = model.to(getattr(torch, config.precision.compute))
    tokens = torch.from_numpy(tokens_BT).long().to(model.device)

    @torch.no_grad()
    def run() -> float:
        logits = model(tokens[:, :-1]).logits.flatten(0, 1).float()
        targets = tokens[:, 1:].flatten()
        return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    return run


def main() -> None:
    print(machine())
    for config in cases():
        for shape in SHAPES:
            model = dataclasses.replace(config.model, max_seq_len=shape[1])
            config = dataclasses.replace(config, model=model)
            tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
            sides = {"dsjax": dsjax_score(config, tokens_BT)}
            if transformers_runs_here():
                sides["transformers"] = transformers_score(config, tokens_BT)
            median = median_seconds(sides, ROUNDS, time.process_time)
            line = ", ".join(f"{name} {taken:.3f} s" for name, taken in median.items())
            print(f"{config.name}, {shape[0]} x {shape[1]:,} tokens: {line}")
            if len(sides) > 1:
                ratio = median["transformers"] / median["dsjax"]
                print(f"  {ratio:.2f} times as fast as transformers", flush=True)


if __name__ == "__main__":
    main()

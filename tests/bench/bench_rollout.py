"""What uneven answers cost a rollout: tokens per second of answers of many lengths, as a share of
those of answers that all end together, which is what the engine can do with full rows.

The model of configs/pipelines/r1_tiny.py with random weights, 16 prompts with 16 answers each, log-
probabilities reported. Limits are drawn from 20 to 160 tokens, or are all 160; both take turns, and
medians are printed. `--profile` prints where the host's time goes in one run of the uneven ones.

    python -m tests.bench.bench_rollout [--experts] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

import numpy as np

from configs.pipelines.r1_tiny import MODEL
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from tests.model.tiny import tiny_model

PROMPTS, GROUP, ROUNDS = 16, 16, 5
SHORTEST, LONGEST = 20, 160


def requests(limits: list[int], *, experts: bool) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, MODEL.vocab_size, (PROMPTS, 14)).tolist()
    return [
        Request(
            tuple(prompts[number // GROUP]), limit, Sampling(seed=number),
            logprobs=True, experts=experts,
        )
        for number, limit in enumerate(limits)
    ]  # fmt: skip


def rate(engine: Engine, asked: list[Request]) -> float:
    """Returns the new tokens per second, prompts and all that the host does included."""
    began = time.perf_counter()
    engine.complete(asked)
    return engine.statistics.new_tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    n_requests = PROMPTS * GROUP
    drawn = np.random.default_rng(1).integers(SHORTEST, LONGEST + 1, n_requests).tolist()
    full = requests([LONGEST] * n_requests, experts=options.experts)
    uneven = requests(drawn, experts=options.experts)
    engine = Engine(tiny_model(MODEL), streaming=False)
    rates: dict[str, list[float]] = {"full": [], "uneven": []}
    for round_ in range(ROUNDS + 1):
        for name, asked in (("full", full), ("uneven", uneven)):
            found = rate(engine, asked)
            if round_:  # the first one compiles
                rates[name].append(found)
    full_rate, uneven_rate = (statistics.median(rates[name]) for name in ("full", "uneven"))
    print(f"full rows {full_rate:,.0f} tokens/s, uneven {uneven_rate:,.0f} tokens/s")
    print(f"share {uneven_rate / full_rate:.1%}")
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(engine.complete, uneven)
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()

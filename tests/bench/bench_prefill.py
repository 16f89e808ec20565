"""Running a prompt with the V3 architecture against Hugging Face transformers, on this machine, in
one run, and its cost as prompts grow.

The models and types of bench_train_step, random weights, one prompt, no token of which is known
before. Times are of the processor, which other work disturbs less than the clock's; the sides take
turns and the medians are printed. `growth` is the time of a length over that of 512 tokens, beside
the same of the operations that the model needs: products with the activated weights, and attention
of each token to those before it.

Run: python -m tests.bench.bench_prefill [tokens ...], after `pip install -e '.[reference]'` for the
Hugging Face side; by default 128 to 4,096 tokens.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from dsjax.model.flops import forward_flops_per_token
from tests.bench.bench_decode import dsjax_generate
from tests.bench.sides import cases, machine, transformers_model, transformers_runs_here

LENGTHS = (128, 511, 512, 2046, 4096)
BASE = 512

Run = Callable[[np.ndarray], object]  # prompt [1, T]


def processor_seconds(run: Run, prompt_BT: np.ndarray) -> float:
    start = time.process_time()
    run(prompt_BT)
    return time.process_time() - start


def transformers_prefill(model: object) -> Run:
    import torch

    @torch.no_grad()
    def run(prompt_BT: np.ndarray) -> object:
        return model(torch.from_numpy(prompt_BT), use_cache=True, logits_to_keep=1)  # type: ignore

    return run


def main() -> None:
    lengths = [int(length) for length in sys.argv[1:]] or list(LENGTHS)
    print(machine())
    for config in cases():
        model = dataclasses.replace(config.model, max_seq_len=2 * max(lengths))
        config = dataclasses.replace(config, model=model)
        generate = dsjax_generate(config)
        sides: dict[str, Run] = {
            "dsjax": lambda prompt_BT, generate=generate: generate(prompt_BT, 1)
        }
        if transformers_runs_here():
            sides["transformers"] = transformers_prefill(transformers_model(config).eval())
        rng = np.random.default_rng(0)
        medians: dict[int, dict[str, float]] = {}
        for length in dict.fromkeys([BASE, *lengths]):
            taken: dict[str, list[float]] = {name: [] for name in sides}
            for round_ in range(6 if length <= 1024 else 4):
                prompt_BT = rng.integers(0, model.vocab_size, (1, length))
                for name, run in sides.items():
                    seconds = processor_seconds(run, prompt_BT)
                    if round_:  # the first compiles
                        taken[name].append(seconds)
            medians[length] = {name: statistics.median(each) for name, each in taken.items()}
            flops = length * forward_flops_per_token(model, length)
            growth = medians[length]["dsjax"] / medians[BASE]["dsjax"]
            work = flops / (BASE * forward_flops_per_token(model, BASE))
            line = ", ".join(f"{name} {t * 1e3:,.0f} ms" for name, t in medians[length].items())
            print(
                f"{config.name}, {length:,} tokens: {line}; growth {growth:.2f}, of work {work:.2f}"
            )
            if len(sides) > 1:
                ratio = medians[length]["transformers"] / medians[length]["dsjax"]
                print(f"  {ratio:.2f} times as fast as transformers", flush=True)


if __name__ == "__main__":
    main()

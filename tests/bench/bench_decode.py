"""Greedy generation with the V3 architecture against Hugging Face transformers, on this machine, in
one run.

The 80M parameters of bench_train_step, float32, random weights and prompts: 128 new tokens after a
prompt of 128, batch 1 and 8. A decoding step's time is the difference between generating 128 tokens
and one, divided by 127. The sides take turns, so that a noisy neighbour hits both; the ratio of
medians is printed. The limit is the time to read what a step reads, the activated parameters and
the cache, at the rate at which this machine adds up a large array.

Run: python -m tests.bench.bench_decode, after `pip install -e '.[reference]'` for the Hugging Face
side.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.infer.engine import Engine, Request
from dsjax.infer.sampling import Sampling
from dsjax.model.flops import cache_bytes_per_token
from dsjax.model.parameters import declarations, initialize
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from tests.bench.bench_train_step import MODEL, transformers_model

PROMPT, NEW, ROUNDS = 128, 128, 5

Generate = Callable[[np.ndarray, int], object]  # prompts [B, T], new tokens


def dsjax_generate() -> Generate:
    declared = Transformer(MODEL, Policy(jnp.float32))
    engine = Engine(jax.jit(lambda key: initialize(declared, key))(jax.random.key(0)))

    def generate(prompts_BT: np.ndarray, n_tokens: int) -> object:
        greedy = Sampling(temperature=0.0)
        return list(
            engine.generate([Request(tuple(row), n_tokens, greedy) for row in prompts_BT.tolist()])
        )

    return generate


def transformers_generate() -> Generate:
    model = transformers_model().eval()
    import torch

    def generate(prompts_BT: np.ndarray, n_tokens: int) -> object:
        prompts = torch.from_numpy(prompts_BT)
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=n_tokens,
            max_new_tokens=n_tokens,
            pad_token_id=0,
        )

    return generate


def limit_seconds(batch: int, bytes_per_second: float) -> float:
    """The time to read what a step of decoding reads, with experts evenly chosen."""
    E, K = MODEL.n_routed_experts, MODEL.n_activated_experts
    declared = declarations(Transformer(MODEL, Policy(jnp.float32)))
    chosen = E * (1 - (1 - K / E) ** batch)
    read = 0.0
    for parameter in declared:
        if not parameter.path.startswith("embed."):
            share = chosen / E if ".experts." in parameter.path else 1.0
            read += 4 * share * parameter.count
    read += batch * (PROMPT + NEW / 2) * cache_bytes_per_token(MODEL, bytes_per_value=4)
    return read / bytes_per_second


def measure_read_rate() -> float:
    """Bytes a second of adding up 512 MiB."""
    array = jnp.ones((2**27,), jnp.float32)
    add = jax.jit(jnp.sum)
    add(array).block_until_ready()
    return array.nbytes / min(_seconds(lambda: add(array).block_until_ready()) for _ in range(10))


def _seconds(function: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def step_seconds(sides: dict[str, Generate], prompts_BT: np.ndarray) -> dict[str, float]:
    """The median time of a decoding step of each side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(ROUNDS + 1):
        for name, generate in sides.items():
            one, many = (_seconds(generate, prompts_BT, n) for n in (1, NEW))
            if round_:  # the first compiles
                times[name].append((many - one) / (NEW - 1))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    sides = {"dsjax": dsjax_generate(), "transformers": transformers_generate()}
    print(f"jax {jax.__version__} on {jax.default_backend()}, {os.cpu_count()} cores")
    for batch in (1, 8):
        prompts_BT = np.random.default_rng(0).integers(0, MODEL.vocab_size, (batch, PROMPT))
        median = step_seconds(sides, prompts_BT)
        rate = measure_read_rate()
        limit = limit_seconds(batch, rate)
        print(f"batch {batch}, reading at {rate / 1e9:.0f} GB/s:")
        for name, seconds in [*median.items(), ("limit", limit)]:
            print(f"  {name:13} {seconds * 1e3:.2f} ms a step, {batch / seconds:.0f} tokens/s")
        ratio = median["transformers"] / median["dsjax"]
        print(f"  dsjax / transformers: {ratio:.2f}x the tokens/s")


if __name__ == "__main__":
    main()

"""Greedy generation with the V3 architecture against Hugging Face transformers, on this machine, in
one run.

The models and types of bench_train_step, random weights and prompts: 128 new tokens after a prompt
of 128, batch 1, 8, 32 and 64. A decoding step's time is the difference between generating 128
tokens and one, divided by 127, of the processor if there is one core (`taskset`). The sides take
turns; the ratio of medians is printed. The limit is the time to read what a step reads, the
activated parameters and the cache, at the rate at which this machine adds up a large array, or an
accelerator copies one.

Run: python -m tests.bench.bench_decode [names of models], after `pip install -e '.[reference]'` for
the Hugging Face side.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import Config
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.model.flops import cache_bytes_per_token
from dsjax.model.parameters import declarations, initialize
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from tests.bench.sides import (
    cases,
    fitting_clock,
    machine,
    seconds,
    transformers_model,
    transformers_runs_here,
)

PROMPT, NEW = 128, 128

Generate = Callable[[np.ndarray, int], object]  # prompts [B, T], new tokens


def dsjax_generate(config: Config, **options: Any) -> Generate:
    """Generation by an engine with these options."""
    dtype = jnp.dtype(config.precision.compute)
    declared = Transformer(config.model, Policy(dtype))

    def make(key: jax.Array) -> Transformer:
        """Weights of the type that a checkpoint's would be loaded as; the router's bias stays."""
        graph, parameters, rest = nnx.split(initialize(declared, key), nnx.Param, ...)
        return nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), parameters), rest)

    engine = Engine(jax.jit(make)(jax.random.key(0)), **options)

    def generate(prompts_BT: np.ndarray, n_tokens: int) -> object:
        greedy = Sampling(temperature=0.0)
        return list(
            engine.generate([Request(tuple(row), n_tokens, greedy) for row in prompts_BT.tolist()])
        )

    return generate


def transformers_generate(config: Config) -> Generate:
    model = transformers_model(config).eval()
    import torch

    model = model.to(getattr(torch, config.precision.compute))

    def generate(prompts_BT: np.ndarray, n_tokens: int) -> object:
        prompts = torch.from_numpy(prompts_BT).to(model.device)
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=n_tokens,
            max_new_tokens=n_tokens,
            pad_token_id=0,
        )

    return generate


def bytes_read(config: Config, batch: int, cached: float) -> float:
    """What a step of decoding reads after so many tokens, with experts evenly chosen."""
    model, width = config.model, jnp.dtype(config.precision.compute).itemsize
    E, K = model.n_routed_experts, model.n_activated_experts
    chosen = E * (1 - (1 - K / E) ** batch)
    read = 0.0
    for parameter in declarations(Transformer(model, Policy(jnp.float32))):
        if not parameter.path.startswith("embed."):
            share = chosen / E if ".experts." in parameter.path else 1.0
            read += width * share * parameter.count
    return read + batch * cached * cache_bytes_per_token(model, bytes_per_value=width)


def measure_read_rate() -> float:
    """Bytes a second of adding up 512 MiB, or read and written in copying 2 GiB."""
    on_cpu = jax.default_backend() == "cpu"
    array = jnp.ones((2**27 if on_cpu else 2**29,), jnp.float32)
    touch = jax.jit(jnp.sum if on_cpu else lambda array: array + 1)
    touch(array).block_until_ready()
    clock = fitting_clock()
    taken = min(seconds(lambda: touch(array).block_until_ready(), clock=clock) for _ in range(10))
    return array.nbytes * (1 if on_cpu else 2) / taken


def step_seconds(
    sides: dict[str, Generate], prompts_BT: np.ndarray, new: int = NEW
) -> dict[str, float]:
    """The median time of a decoding step of each side, of those that `new` tokens take."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    clock = fitting_clock()
    for round_ in range(6 if jax.default_backend() == "cpu" else 4):
        for name, generate in sides.items():
            one, many = (seconds(generate, prompts_BT, n, clock=clock) for n in (1, new))
            if round_:  # the first compiles
                times[name].append((many - one) / (new - 1))
    return {name: statistics.median(taken) for name, taken in times.items()}


def compare(config: Config) -> None:
    sides = {"dsjax": dsjax_generate(config)}
    if transformers_runs_here():
        sides["transformers"] = transformers_generate(config)
    for batch in (1, 8, 32, 64):
        prompts_BT = np.random.default_rng(0).integers(0, config.model.vocab_size, (batch, PROMPT))
        median = step_seconds(sides, prompts_BT)
        rate = measure_read_rate()
        limit = bytes_read(config, batch, PROMPT + NEW / 2) / rate
        print(f"{config.name}, {config.precision.compute}, batch {batch}, ", end="")
        print(f"reading at {rate / 1e9:.0f} GB/s:")
        for name, taken in [*median.items(), ("limit", limit)]:
            print(f"  {name:13} {taken * 1e3:.2f} ms a step, {batch / taken:.0f} tokens/s", end="")
            print(f", {limit / taken:.0%} of the limit")
        if "transformers" in median:
            ratio = median["transformers"] / median["dsjax"]
            print(f"  dsjax / transformers: {ratio:.2f}x the tokens/s", flush=True)


def main() -> None:
    print(machine())
    for config in cases():
        if config.name in (sys.argv[1:] or [config.name]):
            compare(config)


if __name__ == "__main__":
    main()

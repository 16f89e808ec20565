"""Greedy generation by dsjax with weights of every type, and by llama.cpp with our GGUF files if it
is installed, on this machine in one run.

    pip install llama-cpp-python    # builds llama.cpp: minutes
    python -m tests.bench.bench_gguf [TYPE ...]     # of llama.cpp; by default F32 F16 Q8_0 Q4_0

The 80M model of the other benchmarks with random weights, exported as each type; batch 1, a prompt
of 128 tokens, 128 new ones. llama.cpp has one thread fewer than there are cores, for its threads
wait in loops and two jobs on a core make it many times slower; its cache is float32, as ours. A
step's time is the difference between 128 new tokens and one, divided by 127, of the processor if
there is one core (`taskset`). The sides take turns, and medians of five rounds are printed.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np

import dsjax
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from tests.bench.sides import MODEL_80M, fitting_clock, machine, seconds
from tests.checkpoint.gguf.files import exported
from tests.checkpoint.hf_files import plain, write
from tests.golden.cases import CASES, Case

PROMPT, NEW, ROUNDS = 128, 128, 5
OURS = ("float32", "bfloat16", "fp8", "int8", "int4")

Generate = Callable[[list[int], int], list[int]]


def config_80m() -> dict:
    """MODEL_80M as a config.json."""
    model = MODEL_80M
    return CASES["v3"].config | {
        "vocab_size": model.vocab_size, "hidden_size": model.dim,
        "intermediate_size": model.inter_dim, "moe_intermediate_size": model.moe_inter_dim,
        "num_hidden_layers": model.n_layers, "first_k_dense_replace": model.n_dense_layers,
        "num_attention_heads": model.n_heads, "num_key_value_heads": model.n_heads,
        "q_lora_rank": model.q_lora_rank, "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim, "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim, "n_routed_experts": model.n_routed_experts,
        "n_shared_experts": model.n_shared_experts, "n_group": model.n_expert_groups,
        "num_experts_per_tok": model.n_activated_experts, "topk_group": model.n_limited_groups,
        "rope_scaling": None,
    }  # fmt: skip


def dsjax_side(folder: Path, dtype: str) -> Generate:
    engine = Engine(dsjax.load(folder, dtype=dtype))

    def generate(prompt: list[int], count: int) -> list[int]:
        request = Request(tuple(prompt), count, Sampling(temperature=0.0))
        return list(engine.complete([request])[0].tokens)

    return generate


def step_seconds(sides: dict[str, Generate], prompt: list[int]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    clock = fitting_clock()
    for round_ in range(ROUNDS + 1):
        for name, generate in sides.items():
            one, many = (seconds(generate, prompt, count, clock=clock) for count in (1, NEW))
            if round_:  # the first compiles
                times[name].append((many - one) / (NEW - 1))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    threads = max((os.cpu_count() or 2) - 1, 1)
    theirs = ["F32", "F16", "Q8_0", "Q4_0"] if find_spec("llama_cpp") else []
    kinds = sys.argv[1:] or theirs
    print(machine() + (f"; llama.cpp with {threads} thread(s)" if kinds else ""))
    case = Case(config_80m(), 1)
    prompt = np.random.default_rng(0).integers(0, MODEL_80M.vocab_size, PROMPT).tolist()
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as open_files:
        folder = write(Path(root) / "hf", case.config, plain(case))
        sides = {f"dsjax {dtype}": dsjax_side(folder, dtype) for dtype in OURS}
        for kind in kinds:
            from tests.reference import llama_cpp_reference

            file = Path(root) / f"{kind}.gguf"
            exported(folder, file, kind)
            model = open_files.enter_context(
                llama_cpp_reference.opened(file, MODEL_80M.vocab_size, 512, threads)
            )
            sides[f"llama.cpp {kind}"] = model.greedy
        first = {name: generate(prompt, 16) for name, generate in sides.items()}
        if "llama.cpp F32" in first:
            assert first["llama.cpp F32"] == first["dsjax float32"], first
        median = step_seconds(sides, prompt)
    ours = median["dsjax float32"]
    for name, taken in median.items():
        print(f"  {name:15} {taken * 1e3:7.2f} ms, {1 / taken:6.0f} tokens/s, ", end="")
        print(f"{ours / taken:.2f}x dsjax float32", flush=True)


if __name__ == "__main__":
    assert jax.default_backend() == "cpu", "a comparison of CPUs: set JAX_PLATFORMS=cpu"
    main()

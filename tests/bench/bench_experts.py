"""Step time against the number of experts, at constant activated parameters, on one CPU device.

A layer that costs every expert for every token would take 16 times as long with 128 experts as with
8; here each token still passes through the same number of them. The three models take turns, so
that a noisy neighbour hits all; each ratio is of two steps that follow one another, and the median
of the ratios is printed.

Weights, gradients and moments do grow with the experts, and with them the optimizer's update, so
the model is small where that counts and the batch is of a usual size.

Run: python -m tests.bench.bench_experts
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config, DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
from dsjax.model.flops import count_parameters
from dsjax.model.parameters import declarations
from dsjax.parallel.mesh import make_mesh
from dsjax.train.step import declared_model, initial_state, train_step

BATCH, LENGTH, ROUNDS = 8, 512, 9
EXPERTS = (8, 32, 128)


def config_with(n_experts: int) -> Config:
    return Config(
        name="bench",
        model=ModelConfig(
            vocab_size=2048,
            dim=256,
            n_layers=4,
            n_dense_layers=1,
            n_heads=8,
            inter_dim=704,
            q_lora_rank=128,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=n_experts,
            n_shared_experts=1,
            n_activated_experts=4,
            moe_inter_dim=128,
            router_bias=True,
            norm_topk=True,
            route_scale=2.5,
            init_std=0.02,
        ),
        data=DataConfig(sequence_length=LENGTH),
        train=TrainConfig(batch_size=BATCH),
        optim=OptimConfig(learning_rate=1e-4),
        precision=PrecisionConfig(compute="float32"),
    )


def make_step(config: Config) -> Callable[[], float]:
    """A training step; calling it returns its seconds."""
    state = initial_state(config, make_mesh({"data": 1}, n_devices=1))
    step = jax.jit(train_step(config), donate_argnums=0)
    tokens = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (1, BATCH, LENGTH + 1), dtype=np.int32
    )
    batch = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.ones(tokens.shape, jnp.int32)}
    knobs = {
        "learning_rate": jnp.float32(1e-4),
        "mtp_weight": jnp.float32(0),
        "bias_update_speed": jnp.float32(1e-3),
    }

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch, knobs))
        assert int(metrics["dropped_tokens"]) == 0
        return time.perf_counter() - start

    return run


def main() -> None:
    configs = {n: config_with(n) for n in EXPERTS}
    steps = {n: make_step(config) for n, config in configs.items()}
    for step in steps.values():
        step()  # compiles
        step()
    seconds: dict[int, list[float]] = {n: [] for n in EXPERTS}
    for _ in range(ROUNDS):
        for n, step in steps.items():
            seconds[n].append(step())
    print(
        f"jax {jax.__version__} on {jax.default_backend()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}"
    )
    first = seconds[EXPERTS[0]]
    for n, config in configs.items():
        counts = count_parameters(declarations(declared_model(config)), config.model)
        ratio = statistics.median(b / a for a, b in zip(first, seconds[n], strict=True))
        print(
            f"{n:4} experts: {counts.total:>11,} parameters, {counts.activated:,} activated; "
            f"{statistics.median(seconds[n]):.3f} s a step, {ratio:.2f} times that of {EXPERTS[0]}"
        )


if __name__ == "__main__":
    main()

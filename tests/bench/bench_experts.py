"""Step time against the number of experts, at constant activated parameters, on one CPU device.

A layer that costs every expert for every token would take 16 times as long with 128 experts as with
8; here each token still passes through the same number of them. The three models take turns, so
that a noisy neighbour hits all.

Weights, gradients and moments do grow with the experts, and with them the optimizer's update, so
the model is small where that counts and the batch is of a usual size.

Run: python -m tests.bench.bench_experts
"""

from __future__ import annotations

from dsjax.config import Config, ModelConfig
from dsjax.model.flops import count_parameters
from dsjax.model.parameters import declarations
from dsjax.train.step import declared_model
from tests.bench.sides import V3_ROUTING, case, dsjax_step, machine, median_seconds

BATCH, LENGTH, ROUNDS = 8, 512, 9
EXPERTS = (8, 32, 128)


def config_with(n_experts: int) -> Config:
    model = ModelConfig(
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
        **V3_ROUTING,
    )
    return case(f"{n_experts} experts", model, BATCH, LENGTH, "float32")


def main() -> None:
    print(machine())
    configs = [config_with(n) for n in EXPERTS]
    seconds = median_seconds({config.name: dsjax_step(config) for config in configs}, ROUNDS)
    first = seconds[configs[0].name]
    for config in configs:
        declared = declared_model(config.model, config.precision)
        counts = count_parameters(declarations(declared), config.model)
        taken = seconds[config.name]
        print(
            f"{config.name:>11}: {counts.total:>11,} parameters, {counts.activated:,} activated; "
            f"{taken:.3f} s a step, {taken / first:.2f} times that of {configs[0].name}"
        )


if __name__ == "__main__":
    main()

"""Train step of the V3 architecture against Hugging Face transformers, on this machine, in one run.

80M parameters (width 512, 6 layers of which 1 dense, 32 experts top-4 in 4 groups keeping 2), batch
4 x 512, AdamW, float32, no MTP, dropless on both sides, natural routing of an untrained model,
random tokens. The sides take turns, so that a noisy neighbour hits both; the ratio of medians is
printed. The limit is the time that this machine's rate of large matrix products would need for the
model's FLOPs.

Run: make bench, after `pip install -e '.[reference]'` for the Hugging Face side. It runs outside
pytest, whose configuration here trades speed for quick compilation.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config, DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
from dsjax.model.flops import train_flops_per_token
from dsjax.parallel.mesh import make_mesh
from dsjax.train.step import initial_state, train_step
from dsjax.train.throughput import measure_matmul_flops

BATCH, LENGTH, ROUNDS = 4, 512, 7

MODEL = ModelConfig(
    vocab_size=8192,
    dim=512,
    n_layers=6,
    n_dense_layers=1,
    n_heads=8,
    inter_dim=1408,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=32,
    n_shared_experts=1,
    n_activated_experts=4,
    moe_inter_dim=256,
    n_expert_groups=4,
    n_limited_groups=2,
    router_bias=True,
    norm_topk=True,
    route_scale=2.5,
    init_std=0.02,
)


def _tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(
        0, MODEL.vocab_size, (BATCH, LENGTH + 1), dtype=np.int32
    )


def dsjax_step() -> Callable[[], float]:
    """One training step of this project on one device; returns the loss."""
    config = Config(
        name="bench",
        model=MODEL,
        data=DataConfig(sequence_length=LENGTH),
        train=TrainConfig(batch_size=BATCH, sequence_balance=0.0),
        optim=OptimConfig(learning_rate=1e-4),
        precision=PrecisionConfig(compute="float32"),
    )
    mesh = make_mesh({"data": 1}, n_devices=1)
    state = initial_state(config, mesh)
    step = jax.jit(train_step(config), donate_argnums=0)
    tokens = jnp.asarray(_tokens())[None]
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    knobs = {
        "learning_rate": jnp.float32(1e-4),
        "mtp_weight": jnp.float32(0),
        "bias_update_speed": jnp.float32(1e-3),
    }

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch, knobs)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return run


def transformers_model(**options: Any) -> Any:
    """transformers' DeepseekV3ForCausalLM of the same shapes, float32, random weights."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed; first: pip install -e '.[reference]'")

    config = transformers.DeepseekV3Config(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.dim,
        intermediate_size=MODEL.inter_dim,
        moe_intermediate_size=MODEL.moe_inter_dim,
        num_hidden_layers=MODEL.n_layers,
        num_attention_heads=MODEL.n_heads,
        num_key_value_heads=MODEL.n_heads,
        n_shared_experts=MODEL.n_shared_experts,
        n_routed_experts=MODEL.n_routed_experts,
        num_experts_per_tok=MODEL.n_activated_experts,
        n_group=MODEL.n_expert_groups,
        topk_group=MODEL.n_limited_groups,
        routed_scaling_factor=MODEL.route_scale,
        norm_topk_prob=True,
        first_k_dense_replace=MODEL.n_dense_layers,
        q_lora_rank=MODEL.q_lora_rank,
        kv_lora_rank=MODEL.kv_lora_rank,
        qk_nope_head_dim=MODEL.qk_nope_head_dim,
        qk_rope_head_dim=MODEL.qk_rope_head_dim,
        v_head_dim=MODEL.v_head_dim,
        max_position_embeddings=LENGTH,
        **options,
    )
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(config).float()


def transformers_step() -> Callable[[], float]:
    """The same step by transformers and torch's AdamW."""
    model = transformers_model(use_cache=False).train()
    import torch

    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.from_numpy(_tokens()).long()

    def run() -> float:
        adamw.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        return float(loss.detach())

    return run


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    theirs, ours = transformers_step(), dsjax_step()
    compile_seconds = _seconds(ours)
    theirs()
    times: dict[str, list[float]] = {"dsjax": [], "transformers": []}
    for _ in range(ROUNDS):
        times["dsjax"].append(_seconds(ours))
        times["transformers"].append(_seconds(theirs))
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    limit = train_flops_per_token(MODEL, LENGTH) * BATCH * LENGTH / measure_matmul_flops(4096)
    print(f"jax {jax.__version__} on {jax.default_backend()}, {os.cpu_count()} cores")
    print(f"dsjax: first step, with compilation, {compile_seconds:.1f} s")
    for name, seconds in [*median.items(), ("limit", limit)]:
        print(f"{name:13} {seconds:.3f} s a step, {BATCH * LENGTH / seconds:.0f} tokens/s")
    print(f"dsjax / transformers: {median['transformers'] / median['dsjax']:.2f}x the tokens/s")


if __name__ == "__main__":
    main()

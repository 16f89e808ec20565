"""What several benchmarks measure: models for the machine at hand, a training step of ours and of
transformers', and turns in which sides take each other's place.

A CPU gets 80M parameters in float32; an accelerator gets bfloat16, `configs/small.py` and a shape
of 3B with V3's own head sizes. MTP is off, for transformers has none; random weights and tokens.
Where memory is large nothing is computed again in the backward pass, as transformers does it.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.small import config as SMALL
from dsjax.config import Config, DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
from dsjax.kernels.target import Target
from dsjax.parallel.compilation import compiler_options
from dsjax.parallel.mesh import make_mesh
from dsjax.train.loss import pretraining
from dsjax.train.optimizer import adamw
from dsjax.train.step import declared_model, initial_state, train_step

Step = Callable[[], float]

# Both sides share an accelerator's memory, so neither may take it all when it starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
LARGE_MEMORY = 120e9  # bytes

V3_ROUTING: dict[str, Any] = {
    "router_bias": True,
    "norm_topk": True,
    "route_scale": 2.5,
    "init_std": 0.02,
}
MODEL_80M = ModelConfig(
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
    **V3_ROUTING,
)
MODEL_3B = ModelConfig(
    vocab_size=32768,
    dim=2048,
    n_layers=16,
    n_dense_layers=1,
    n_heads=16,
    inter_dim=5632,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=56,
    n_shared_experts=1,
    n_activated_experts=6,
    moe_inter_dim=512,
    n_expert_groups=8,
    n_limited_groups=4,
    **V3_ROUTING,
)


def case(
    name: str, model: ModelConfig, batch: int, length: int, compute: Any, remat: Any = "selective"
) -> Config:
    return Config(
        name=name,
        model=model,
        data=DataConfig(sequence_length=length),
        train=TrainConfig(batch_size=batch, sequence_balance=0.0, remat=remat),
        optim=OptimConfig(learning_rate=1e-4),
        precision=PrecisionConfig(compute=compute),
    )


def cases() -> list[Config]:
    """What is measured on this machine."""
    if jax.default_backend() == "cpu":
        return [case("80M", MODEL_80M, 4, 512, "float32")]
    small = dataclasses.replace(SMALL.model, n_mtp=0)
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    remat = "none" if memory > LARGE_MEMORY else "selective"
    return [
        case("small", small, 16, 2048, "bfloat16", remat),
        case("3B", MODEL_3B, 4, 4096, "bfloat16", remat),
    ]


def machine() -> str:
    device = jax.devices()[0]
    return f"jax {jax.__version__} on {device.device_kind}, {os.cpu_count()} cores"


def random_tokens(config: Config) -> np.ndarray:
    """int32 [B, T + 1]."""
    shape = config.train.batch_size, config.data.sequence_length + 1
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)


def dsjax_step(config: Config, segment_ids_BT: np.ndarray | None = None) -> Step:
    """A training step of a config, on one device and random tokens; returns the loss.

    Args:
      segment_ids_BT: int32 [B, T + 1], the document of each token; None: each row is one.
    """
    declared, optimizer = declared_model(config.model, config.precision), adamw(config.optim)
    mesh = make_mesh({"data": 1}, n_devices=1)
    state = initial_state(declared, optimizer, mesh, config.train.seed)
    options = compiler_options(Target.here(), n_devices=1)
    step = train_step(declared, optimizer, pretraining(config))
    step = jax.jit(step, donate_argnums=0, compiler_options=options)
    tokens = jnp.asarray(random_tokens(config))[None]
    segments = jnp.ones_like(tokens) if segment_ids_BT is None else segment_ids_BT[None]
    batch = {"tokens": tokens, "segment_ids": jnp.asarray(segments)}
    knobs = {"learning_rate": 1e-4, "mtp_weight": 0.3, "bias_update_speed": 1e-3}
    knobs = {name: jnp.float32(value) for name, value in knobs.items()}

    def run() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch, knobs))
        assert not metrics["dropped_tokens"]
        return float(metrics["loss"])

    return run


def transformers_model(config: Config, **options: Any) -> Any:
    """transformers' DeepseekV3ForCausalLM of the same shapes, float32, random weights."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed; first: pip install -e '.[reference]'")

    model = config.model
    theirs = transformers.DeepseekV3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.inter_dim,
        moe_intermediate_size=model.moe_inter_dim,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_heads,
        n_shared_experts=model.n_shared_experts,
        n_routed_experts=model.n_routed_experts,
        num_experts_per_tok=model.n_activated_experts,
        n_group=model.n_expert_groups,
        topk_group=model.n_limited_groups,
        routed_scaling_factor=model.route_scale,
        norm_topk_prob=True,
        first_k_dense_replace=model.n_dense_layers,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        max_position_embeddings=config.data.sequence_length,
        **options,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if jax.default_backend() == "gpu" else "cpu"):
        return transformers.DeepseekV3ForCausalLM(theirs).float()


def transformers_runs_here() -> bool:
    """Whether torch can use the kind of machine that JAX uses. A CPU's figure beside an
    accelerator's would say nothing, so there transformers is left out.
    """
    if jax.default_backend() != "gpu":
        return jax.default_backend() == "cpu"
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return torch.cuda.is_available()


def transformers_step(config: Config) -> Step:
    """The same step by transformers and torch's AdamW; bfloat16 by autocast, masters float32."""
    model = transformers_model(config, use_cache=False).train()
    import torch

    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.from_numpy(random_tokens(config)).long().to(model.device)
    half = config.precision.compute == "bfloat16"

    def run() -> float:
        adamw.zero_grad(set_to_none=True)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return run


def seconds(
    function: Callable[..., object],
    *arguments: object,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    start = clock()
    function(*arguments)
    return clock() - start


def fitting_clock() -> Callable[[], float]:
    """The processor's time on a single core of a CPU (`taskset`), which other work there disturbs
    less; elsewhere the clock's.
    """
    alone = jax.default_backend() == "cpu" and len(os.sched_getaffinity(0)) == 1
    return time.process_time if alone else time.perf_counter


def median_seconds(
    sides: dict[str, Step], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Of each side its median time: all take turns, so that a noisy neighbour hits each of them.

    The first round, which compiles, is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, step in sides.items():
            times[name].append(seconds(step, clock=clock))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}

"""Very small models of the families that reinforcement learning begins with, and its config."""

import dataclasses

from dsjax.config import ModelConfig, OptimConfig, PrecisionConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.reinforcement import Reinforcement, RlConfig
from tests.model.tiny import TINY

V3 = dataclasses.replace(TINY, n_mtp=1, max_seq_len=128)
V2 = dataclasses.replace(
    TINY, n_mtp=0, max_seq_len=128, score_func="softmax", group_score="max", router_bias=False,
    norm_topk=False, q_lora_rank=0, route_scale=1.0,
)  # fmt: skip
QWEN2 = ModelConfig(
    vocab_size=96, dim=32, n_layers=2, n_dense_layers=2, n_heads=4, n_kv_heads=2, inter_dim=48,
    attention="gqa", qkv_bias=True, tie_embed=True, rope_theta=1e6, init_std=0.1, max_seq_len=128,
)  # fmt: skip
SHAPES = {"V3": V3, "V2": V2, "Qwen2": QWEN2}


def config_of(model, *, compute="float32", train=None, optim=None, reward=None, **rl):
    """A reinforcement config with very few and short answers."""
    groups = {} if reward is None else {"reward": reward}
    return Reinforcement(
        name="tiny",
        model=model,
        train=TuningConfig(**{"batch_size": 2, "remat": "none"} | (train or {})),
        optim=OptimConfig(
            **{"learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0} | (optim or {})
        ),
        precision=PrecisionConfig(compute=compute),
        rl=RlConfig(**{"prompts": 2, "group_size": 3, "max_new_tokens": 8} | rl),
        **groups,
    )

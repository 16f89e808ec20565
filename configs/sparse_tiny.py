r"""The tiny model (`configs/tiny.py`) with DeepSeek-V3.2's indexer: a query attends to 64 of up to
256 tokens.

It continues a run of `configs/tiny.py` in V3.2's two stages (arXiv:2512.02556, section 2.1):
first the indexers alone learn to predict dense attention, then all parameters train under sparse
attention. `docs/sparse.md` has figures. Without `init` it trains from random weights.

Command: python tools/train.py configs/sparse_tiny.py --workdir runs/sparse \
    --set init=runs/indexer
Hardware: 2 CPU cores, 8 GB of memory.
Cost: about 2 seconds per step. Before it the warm-up: `--set init=runs/tiny train.indexer=warmup
    train.steps=60 optim.learning_rate=1e-2`.
Expected: the index loss falls in the warm-up, and the held-out loss under sparse attention comes
back to that of the dense model.
"""

from dsjax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    TrainConfig,
)

config = Config(
    name="sparse_tiny",
    model=ModelConfig(
        vocab_size=4096,
        dim=256,
        n_layers=5,
        n_dense_layers=1,
        n_heads=4,
        inter_dim=704,
        init_std=0.02,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        index_n_heads=16,
        index_head_dim=32,
        index_topk=64,
        n_routed_experts=16,
        n_shared_experts=1,
        n_activated_experts=2,
        moe_inter_dim=128,
        n_expert_groups=4,
        n_limited_groups=2,
        score_func="sigmoid",
        group_score="top2",
        router_bias=True,
        norm_topk=True,
        route_scale=2.5,
        n_mtp=1,
    ),
    data=DataConfig(sequence_length=256),
    train=TrainConfig(
        steps=60,
        batch_size=8,
        remat="none",  # memory is sufficient
        bias_update_speed=0.001,
        sequence_balance=0.0001,
        eval_every=20,
        checkpoint_every=60,
    ),
    optim=OptimConfig(learning_rate=2e-4, schedule="constant", warmup_steps=0),
    precision=PrecisionConfig(compute="float32"),
)

"""Small: about 300M parameters with every DeepSeek-V3 mechanism except YaRN, for one GPU.

A larger `tiny`: 12 layers of width 768, 32 experts in 8 groups of which 4 are kept. The recipe is
V3's with a learning rate for this size, for 2.6B tokens. The default text, Python's standard
library, is far too little for it: give `data.files`.

Command: python tools/train.py configs/small.py --workdir runs/small --set data.files='text/*.jsonl'
Hardware: one GPU of 80 GB, or one TPU chip of 95 GB (v5p).
Cost: not run yet. One H200 reached 310,000 tokens/s in steps of 32,768 tokens without MTP (10 GB).
Expected: not run yet.
"""

from dsjax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    name="small",
    model=ModelConfig(
        vocab_size=32768,
        dim=768,
        n_layers=12,
        n_dense_layers=1,
        n_heads=12,
        inter_dim=2048,
        q_lora_rank=384,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        n_shared_experts=1,
        n_activated_experts=4,
        moe_inter_dim=256,
        n_expert_groups=8,
        n_limited_groups=4,
        score_func="sigmoid",
        group_score="top2",
        router_bias=True,
        norm_topk=True,
        route_scale=2.5,
        n_mtp=1,
    ),
    data=DataConfig(sequence_length=2048),
    train=TrainConfig(
        steps=20_000, batch_size=64, micro_batch_size=16, eval_every=500, checkpoint_every=500
    ),
    optim=OptimConfig(learning_rate=6e-4, warmup_steps=1000),
)

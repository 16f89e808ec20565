"""DeepSeek-V2-Lite, 15.7B (2.4B activated): the released shape and the pre-training recipe.

Paper: DeepSeek-V2 (arXiv:2405.04434), appendix B. 5.7T tokens in batches of 4,608 sequences,
learning rate times 0.316 at 80% and at 90%, expert-level balance loss only. MLA without a query
latent; greedy top-6 of a softmax, not renormalised; no groups.

The rope fields are those of the released checkpoint (YaRN, mscale 0.707). Pre-training at 4,096
tokens ran without it: add `--set model.rope_scaling=none`. `micro_batch_size` is our choice.

Command: python tools/train.py configs/v2_lite.py --workdir runs/v2_lite \
    --set model.rope_scaling=none data.files='text/*.parquet' data.tokenizer=v2-lite/tokenizer.json
Hardware: weights, gradients and moments are 251 GB, so 8 GPUs of 80 GB or more. Not run by us.
Cost: 9.4e22 FLOPs (16.4 G a token).
Expected: not run; `tools/show.py` gives 15,706,484,224 parameters.
"""

from dsjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    name="v2_lite",
    model=ModelConfig(
        vocab_size=102400,
        dim=2048,
        n_layers=27,
        n_dense_layers=1,
        n_heads=16,
        inter_dim=10944,
        norm_eps=1e-6,
        init_std=0.006,
        max_seq_len=163840,
        q_lora_rank=0,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_theta=10000.0,
        rope_scaling="yarn",
        rope_factor=40.0,
        original_seq_len=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=0.707,
        mscale_all_dim=0.707,
        n_routed_experts=64,
        n_shared_experts=2,
        n_activated_experts=6,
        moe_inter_dim=1408,
        score_func="softmax",
        group_score="max",
        norm_topk=False,
        route_scale=1.0,
    ),
    data=DataConfig(sequence_length=4096, fim_rate=0.0),
    train=TrainConfig(
        steps=301_996,
        batch_size=4608,
        micro_batch_size=512,
        bias_update_speed=0.0,
        sequence_balance=0.0,
        expert_balance=0.001,
    ),
    optim=OptimConfig(
        learning_rate=4.2e-4,
        schedule="multistep",
        warmup_steps=2000,
        decay_points=(0.8, 0.9),
        decay_ratios=(0.316, 0.316**2),
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        clip_norm=1.0,
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

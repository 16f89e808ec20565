r"""DeepSeek-V3 and R1, 671B: the released shape and the pre-training recipe.

Paper: DeepSeek-V3 (arXiv:2412.19437), sections 2 and 4.2. 14.8T tokens: learning rate constant to
10T, cosine to a tenth over 4.3T, then two tails; batch of 3,072 sequences growing to 15,360 over
the first 469B tokens; Adam moments in bfloat16; MTP weight 0.3 to 10T tokens, then 0.1; bias update
off for the last 500B. The ramp fraction is 469B tokens counted in steps.

The rope fields are those of the released checkpoint, whose context was extended to 128K with YaRN.
Pre-training at 4,096 tokens ran without it: add `--set model.rope_scaling=none`.
`micro_batch_size`, `remat` and the layout over devices are our choice: 64-way expert parallelism
as in the paper, and the rest of the devices splits weights and optimizer state (fsdp), where the
paper had 16 pipeline stages. `docs/plan.md` has what the TPU compiler says of it.

Command: python tools/train.py configs/v3_671b.py --workdir runs/v3 --set model.rope_scaling=none \
    data.files='text/*.parquet' data.tokenizer=deepseek-v3/tokenizer.json
Hardware: the paper used 2,048 H800; weights, gradients and moments alone are 8 TB. Not run by us.
Cost: 2.664M H800-hours for pre-training (paper, table 1).
Expected: not run; `tools/show.py` gives 671,026,419,200 parameters and 37,552,297,472 activated.
"""

from dsjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    name="v3_671b",
    model=ModelConfig(
        vocab_size=129280,
        dim=7168,
        n_layers=61,
        n_dense_layers=3,
        n_heads=128,
        inter_dim=18432,
        norm_eps=1e-6,
        init_std=0.006,
        max_seq_len=163840,
        q_lora_rank=1536,
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
        mscale=1.0,
        mscale_all_dim=1.0,
        n_routed_experts=256,
        n_shared_experts=1,
        n_activated_experts=8,
        moe_inter_dim=2048,
        n_expert_groups=8,
        n_limited_groups=4,
        score_func="sigmoid",
        group_score="top2",
        router_bias=True,
        norm_topk=True,
        route_scale=2.5,
        n_mtp=1,
    ),
    data=DataConfig(sequence_length=4096, fim_rate=0.1),
    train=TrainConfig(
        steps=240_209,
        batch_size=15360,
        batch_size_start=3072,
        batch_ramp_fraction=0.0517,
        micro_batch_size=512,
        mtp_weight=0.3,
        mtp_weight_final=0.1,
        mtp_switch=10.0 / 14.8,
        bias_update_speed=0.001,
        bias_update_until=14.3 / 14.8,
        sequence_balance=0.0001,
        remat="full",
    ),
    optim=OptimConfig(
        learning_rate=2.2e-4,
        schedule="v3",
        warmup_steps=2000,
        decay_points=(10.0 / 14.8, 14.3 / 14.8, 14.633 / 14.8),
        decay_ratios=(0.1, 7.3e-6 / 2.2e-4),
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        clip_norm=1.0,
        moment_dtype="bfloat16",
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=64),
)

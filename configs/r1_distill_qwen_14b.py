r"""DeepSeek-R1-Distill-Qwen-14B: the released shape and the fine-tuning recipe.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement: fine-tuned from Qwen2.5-14B
on about 800K samples of R1, 2 to 3 epochs, batches of 64 sequences of 32,768 tokens, cosine from
7e-5 to a tenth. Two epochs here: 804,745 samples of 5,355 tokens on average, packed and isolated.
Qwen2's shape: biases on q, k and v. Its base model has a norm epsilon of 1e-5 and theta 1e6, unlike
the two smaller ones. Warm-up is not published; there is none here.

What is missing for the real thing: the samples were not released, and this trains from scratch,
since starting from a converted checkpoint is not there yet.

Command: python tools/train.py configs/r1_distill_qwen_14b.py --workdir runs/r1_distill_qwen_14b \
    --set data.files='samples/*.jsonl' data.tokenizer=r1-distill/tokenizer.json
Hardware: weights, gradients and moments are 236 GB, so 8 GPUs of 80 GB or more. Not run by us.
Cost: not published.
Expected: not run.
"""

from dsjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    name="r1_distill_qwen_14b",
    model=ModelConfig(
        vocab_size=152064,
        dim=5120,
        n_layers=48,
        n_dense_layers=48,
        n_heads=40,
        inter_dim=13824,
        norm_eps=1e-5,
        init_std=0.02,
        max_seq_len=131072,
        attention="gqa",
        n_kv_heads=8,
        head_dim=128,
        qkv_bias=True,
        rope_theta=1000000.0,
    ),
    data=DataConfig(sequence_length=32768, fim_rate=0.0, isolate_documents=True),
    train=TrainConfig(steps=4110, batch_size=64, micro_batch_size=16),
    optim=OptimConfig(
        learning_rate=7e-5,
        schedule="v3",
        warmup_steps=0,
        decay_points=(0.0, 1.0, 1.0),
        decay_ratios=(0.1, 0.1),
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        clip_norm=1.0,
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

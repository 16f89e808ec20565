r"""DeepSeek-R1-Distill-Llama-8B: the released shape and the fine-tuning recipe.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement: fine-tuned from Llama-3.1-8B
on about 800K samples of R1, 2 to 3 epochs, batches of 64 sequences of 32,768 tokens, cosine from
5e-5 to a tenth. Two epochs here: 804,745 samples of 5,355 tokens on average, packed and isolated.
Llama 3.1's rope scaling. Warm-up is not published; there is none here.

What is missing for the real thing: the samples were not released, and this trains from scratch,
since starting from a converted checkpoint is not there yet.

Command: python tools/train.py configs/r1_distill_llama_8b.py --workdir runs/r1_distill_llama_8b \
    --set data.files='samples/*.jsonl' data.tokenizer=r1-distill/tokenizer.json
Hardware: weights, gradients and moments are 128 GB, so 4 GPUs of 80 GB or more. Not run by us.
Cost: not published.
Expected: not run.
"""

from dsjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    name="r1_distill_llama_8b",
    model=ModelConfig(
        vocab_size=128256,
        dim=4096,
        n_layers=32,
        n_dense_layers=32,
        n_heads=32,
        inter_dim=14336,
        norm_eps=1e-5,
        init_std=0.02,
        max_seq_len=131072,
        attention="gqa",
        n_kv_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        rope_scaling="llama3",
        rope_factor=8.0,
        original_seq_len=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    data=DataConfig(sequence_length=32768, fim_rate=0.0, isolate_documents=True),
    train=TrainConfig(steps=4110, batch_size=64, micro_batch_size=16),
    optim=OptimConfig(
        learning_rate=5e-5,
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

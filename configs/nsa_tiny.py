"""Tiny with native sparse attention (NSA): about 4M parameters, grouped queries in three branches.

Runs of 16 tokens are compressed every 8, the 6 best blocks of 16 selected, the last 64 tokens
always seen (arXiv:2502.11089). So of 512 tokens a query meets at most 63 + 96 + 64 keys. The dense
counterpart is the same with `--set model.attention=gqa`. Trains on the default text, the source
code of this machine's Python standard library.

Command: python tools/train.py configs/nsa_tiny.py --workdir runs/nsa_tiny
Hardware: 2 CPU cores, 8 GB of memory.
Cost: 18 minutes with AVX2, beside other work; 3 seconds per step at best, where the dense
counterpart takes 0.7: 512 tokens are too few for sparse attention to pay.
Expected: 2.395 held-out bits per byte; the dense counterpart has 2.413 (seed 0, jax 0.10.2,
float32). 200 steps are a fraction of an epoch, so neither has learned much.
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
    name="nsa_tiny",
    model=ModelConfig(
        vocab_size=4096,
        dim=192,
        n_layers=4,
        n_dense_layers=4,
        n_heads=8,
        inter_dim=512,
        init_std=0.02,
        attention="nsa",
        n_kv_heads=2,
        head_dim=32,
        nsa_length=16,
        nsa_stride=8,
        nsa_block=16,
        nsa_count=6,
        nsa_window=64,
    ),
    data=DataConfig(sequence_length=512),
    train=TrainConfig(
        steps=200,
        batch_size=4,
        remat="none",  # memory is sufficient
        eval_every=50,
        checkpoint_every=100,
    ),
    optim=OptimConfig(learning_rate=2e-3, warmup_steps=20),
    precision=PrecisionConfig(compute="float32"),
)

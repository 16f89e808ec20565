r"""The tiny model (`configs/tiny.py`) with DeepSeek-V3.2's indexer: a query attends to 64 of up to
256 tokens.

It continues a run of `configs/tiny.py` in V3.2's two stages (arXiv:2512.02556, section 2.1):
first the indexers alone learn to predict dense attention, then all parameters train under sparse
attention. Without `--init` it trains from random weights.

Command: python tools/train.py configs/sparse_tiny.py --init runs/indexer --workdir runs/sparse
Hardware: 2 CPU cores, 8 GB of memory.
Cost: 2.7 minutes with AVX2, compiling included, 1.6 seconds per step (jax 0.10.2, float32); and 2
for the warm-up before it: `--init runs/tiny --workdir runs/indexer --set train.indexer=warmup
train.steps=60 optim.learning_rate=1e-2`.
Expected: the index loss falls from 8.2 to 0.83 nats in the warm-up and to 0.63 here. Held-out bits
per byte: 1.792 dense, 1.794 under sparse attention after the warm-up, 1.779 at the end.
"""

import dataclasses
from pathlib import Path

from dsjax import settings
from dsjax.config import Config, OptimConfig

TINY = settings.read_python(Path(__file__).with_name("tiny.py"), Config)

config = dataclasses.replace(
    TINY,
    name="sparse_tiny",
    model=dataclasses.replace(TINY.model, index_n_heads=16, index_head_dim=32, index_topk=64),
    train=dataclasses.replace(
        TINY.train, steps=60, bias_update_speed=0.001, eval_every=20, checkpoint_every=60
    ),
    optim=OptimConfig(learning_rate=2e-4, schedule="constant", warmup_steps=0),
)

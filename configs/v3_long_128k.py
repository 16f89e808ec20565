r"""DeepSeek-V3's second phase of long context: 131,072 tokens.

Paper: DeepSeek-V3 (arXiv:2412.19437), section 4.3. The first phase's checkpoint
(`configs/v3_long_32k.py`), the same rope and rate, 1,000 steps of 480 sequences four times as long.
A micro-batch has a sequence for each of 32 groups of devices, which split it (`mesh.context`): our
choice.

Command: python tools/train.py configs/v3_long_128k.py --workdir runs/v3_128k \
    --set init=runs/v3_32k data.files='long/*.parquet'
Hardware: 8 TB of weights, gradients and moments, as for pre-training. Not run by us.
Cost: 0.119M H800-hours for both phases (paper, table 1).
Expected: not run.
"""

import dataclasses

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import V3

config = Config(
    name="v3_long_128k",
    model=dataclasses.replace(V3, max_seq_len=131072),
    data=DataConfig(sequence_length=131072, fim_rate=0.1),
    train=TrainConfig(
        steps=1000,
        batch_size=480,
        micro_batch_size=32,
        mtp_weight=0.1,
        bias_update_speed=0.0,
        remat="full",
    ),
    optim=OptimConfig(
        learning_rate=7.3e-6, schedule="constant", warmup_steps=0, moment_dtype="bfloat16"
    ),
    mesh=MeshConfig(data=1, expert=32, context=-1),
)

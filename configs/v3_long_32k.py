r"""DeepSeek-V3's first phase of long context: 32,768 tokens.

Paper: DeepSeek-V3 (arXiv:2412.19437), section 4.3. After pre-training, YaRN stretches the 4,096
tokens by 40 on the decoupled key alone (beta 1 and 32, temperature 0.1 ln 40 + 1), and 1,000 steps
of 1,920 sequences at the rate with which pre-training ended. `configs/v3_long_128k.py` follows.
MTP weight 0.1 and no bias update, as at the end of pre-training, are our reading;
`remat` and the layout are our choices: a micro-batch has a sequence for each of 64 groups of
devices, which split it (`mesh.context`).

Command: python tools/train.py configs/v3_long_32k.py --init runs/v3 --workdir runs/v3_32k \
    --set data.files='long/*.parquet'
Hardware: 8 TB of weights, gradients and moments, as for pre-training. Not run by us.
Cost: 0.119M H800-hours for both phases (paper, table 1).
Expected: not run.
"""

import dataclasses

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import V3

config = Config(
    name="v3_long_32k",
    model=dataclasses.replace(V3, max_seq_len=32768),
    data=DataConfig(sequence_length=32768, fim_rate=0.1),
    train=TrainConfig(
        steps=1000,
        batch_size=1920,
        micro_batch_size=64,
        mtp_weight=0.1,
        bias_update_speed=0.0,
        remat="full",
    ),
    optim=OptimConfig(
        learning_rate=7.3e-6, schedule="constant", warmup_steps=0, moment_dtype="bfloat16"
    ),
    mesh=MeshConfig(data=1, expert=64, context=-1),
)

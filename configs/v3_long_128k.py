r"""DeepSeek-V3's second phase of long context: 131,072 tokens.

Paper: DeepSeek-V3 (arXiv:2412.19437), section 4.3. The first phase's checkpoint
(`configs/v3_long_32k.py`), the same rope and rate, 1,000 steps of 480 sequences four times as long.
A micro-batch has a sequence for each of 32 groups of devices, which split it (`mesh.context`): our
choice.

Command: python tools/train.py configs/v3_long_128k.py --init runs/v3_32k \
    --workdir runs/v3_128k --set data.files='long/*.parquet'
Hardware: 8 TB of weights, gradients and moments, as for pre-training. Not run by us.
Cost: 0.119M H800-hours for both phases (paper, table 1).
Expected: not run.
"""

import dataclasses
from pathlib import Path

from dsjax import settings
from dsjax.config import Config, DataConfig, MeshConfig

FIRST = settings.read_python(Path(__file__).with_name("v3_long_32k.py"), Config)

config = dataclasses.replace(
    FIRST,
    name="v3_long_128k",
    model=dataclasses.replace(FIRST.model, max_seq_len=131072),
    data=DataConfig(sequence_length=131072, fim_rate=0.1),
    train=dataclasses.replace(FIRST.train, batch_size=480, micro_batch_size=32),
    mesh=MeshConfig(data=1, expert=32, context=-1),
)

r"""Stage 1 of Janus-Pro 1B: the adaptors and the head of codes, for a frozen language model.

Janus-Pro (arXiv:2501.17811), table 2: AdamW without decay, a constant rate, rows of 4,096 tokens.
Pairs of a picture and a short text both ways, and no text alone.

Command: python tools/paint.py configs/janus_pro_1b_stage1.py \
    --init Janus-Pro-1B --workdir runs/one \
    --set janus.see=pairs/ janus.draw=pairs/
Hardware: never run at this size; the paper's is 16 nodes of 8 A100 of 40 GB.
Cost: in the paper nine days for the three stages together.
Expected: not measured here; docs/pictures.md has the stages in small.
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.janus import Janus, JanusConfig
from dsjax.config.posttraining import TuningConfig

config = Janus(
    name="janus_pro_1b_stage1",
    janus=JanusConfig(ratio=(1, 0, 3), trains=("aligner", "drawing")),
    train=TuningConfig(steps=20000, batch_size=256, micro_batch_size=16),
    optim=OptimConfig(learning_rate=1e-3, schedule="constant", warmup_steps=600, weight_decay=0.0),
    mesh=MeshConfig(data=1, fsdp=-1),
)

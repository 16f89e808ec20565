r"""Stage 1 of JanusFlow 1.3B: the aligners and both U-ViTs, for a frozen language model and tower.

JanusFlow (arXiv:2411.07975v2), table 1 and section 4.1: AdamW without decay, a constant rate,
aligned drawings, averaged weights. The paper has a batch of 512 and packs sequences into 4,096
tokens: these are such rows.

Command: python tools/paint.py configs/janusflow_1b_stage1.py \
    --init JanusFlow-1.3B --workdir runs/one \
    --set janus.vae=sdxl-vae janus.see=pairs/ janus.draw=pairs/
Hardware: never run at this size.
Cost: not measured.
Expected: not measured here; the stages have been run in small (tests/janus/test_training.py).
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.janus import Janus, JanusConfig
from dsjax.config.posttraining import TuningConfig

config = Janus(
    name="janusflow_1b_stage1",
    janus=JanusConfig(ratio=(1, 0, 1), trains=("aligner", "drawing"), align=1.0),
    train=TuningConfig(steps=10000, batch_size=512, micro_batch_size=32),
    optim=OptimConfig(
        learning_rate=1e-4, schedule="constant", warmup_steps=2000, weight_decay=0.0, ema=0.99
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

r"""Stage 3 of JanusFlow 1.3B: fine-tuning of everything but the VAE.

JanusFlow (arXiv:2411.07975v2), table 1 and section 4.1: AdamW without decay, a constant rate,
aligned drawings, averaged weights. Its 256 per step do not divide into 21:9:70; these have 300.

Command: python tools/paint.py configs/janusflow_1b_stage3.py \
    --init runs/two/model --workdir runs/three \
    --set janus.vae=sdxl-vae janus.alignment=runs/two/alignment.safetensors \
    janus.see=asked.jsonl janus.text='text/*.jsonl' janus.draw='shards/*.tar'
Hardware: never run at this size.
Cost: not measured.
Expected: not measured here; the stages have been run in small (tests/janus/test_training.py).
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.janus import Janus, JanusConfig
from dsjax.config.posttraining import TuningConfig

config = Janus(
    name="janusflow_1b_stage3",
    janus=JanusConfig(
        ratio=(21, 9, 70), trains=("language", "tower", "aligner", "drawing"), align=1.0
    ),
    train=TuningConfig(steps=26000, batch_size=300, micro_batch_size=100),
    optim=OptimConfig(
        learning_rate=2e-5, schedule="constant", warmup_steps=1000, weight_decay=0.0, ema=0.99
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

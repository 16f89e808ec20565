r"""Stage 2 of JanusFlow 1.3B: unified pre-training of all but the tower.

JanusFlow (arXiv:2411.07975v2), table 1 and section 4.1: AdamW without decay, a constant rate,
aligned drawings, averaged weights. Its 512 per step do not divide into 7:3:40; these have 500. Of
its 390,000 steps the first 10,000 have 3:2:5, which is a run of its own before this one:
`--set janus.ratio=3,2,5 train.steps=10000`.

Command: python tools/paint.py configs/janusflow_1b_stage2.py \
    --init runs/one/model --workdir runs/two \
    --set janus.vae=sdxl-vae janus.alignment=runs/one/alignment.safetensors \
    janus.see=pairs/ janus.text='text/*.jsonl' janus.draw='shards/*.tar'
Hardware: never run at this size.
Cost: not measured.
Expected: not measured here; the stages have been run in small (tests/janus/test_training.py).
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.janus import Janus, JanusConfig
from dsjax.config.posttraining import TuningConfig

config = Janus(
    name="janusflow_1b_stage2",
    janus=JanusConfig(ratio=(7, 3, 40), trains=("language", "aligner", "drawing"), align=1.0),
    train=TuningConfig(steps=380000, batch_size=500, micro_batch_size=100),
    optim=OptimConfig(
        learning_rate=1e-4, schedule="constant", warmup_steps=2000, weight_decay=0.0, ema=0.99
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

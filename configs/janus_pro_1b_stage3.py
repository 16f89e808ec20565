r"""Stage 3 of Janus-Pro 1B: fine-tuning of everything but the VQ tokenizer.

Janus-Pro (arXiv:2501.17811), table 2: AdamW without decay, a constant rate, rows of 4,096 tokens.
The paper's 80,000 steps have 128 rows, which do not divide into 5:1:4; these have 120.

Command: python tools/paint.py configs/janus_pro_1b_stage3.py \
    --init runs/two/model --workdir runs/three \
    --set janus.see=asked.jsonl janus.text='text/*.jsonl' janus.draw='shards/*.tar'
Hardware: never run at this size; the paper's is 16 nodes of 8 A100 of 40 GB.
Cost: in the paper nine days for the three stages together.
Expected: not measured here; docs/pictures.md has the stages in small.
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.janus import Janus, JanusConfig
from dsjax.config.posttraining import TuningConfig

config = Janus(
    name="janus_pro_1b_stage3",
    janus=JanusConfig(ratio=(5, 1, 4), trains=("language", "tower", "aligner", "drawing")),
    train=TuningConfig(steps=80000, batch_size=120, micro_batch_size=40),
    optim=OptimConfig(learning_rate=4e-5, schedule="constant", warmup_steps=0, weight_decay=0.0),
    mesh=MeshConfig(data=1, fsdp=-1),
)

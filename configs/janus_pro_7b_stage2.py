r"""Stage 2 of Janus-Pro 7B: unified pre-training of all but the tower.

Janus-Pro (arXiv:2501.17811), table 2: AdamW without decay, a constant rate, rows of 4,096 tokens.
The paper planned 360,000 steps and stopped after 270,000. Its 512 rows per step do not divide into
2:3:5; these have 520, 40 at a time.

Command: python tools/paint.py configs/janus_pro_7b_stage2.py \
    --init runs/one/model --workdir runs/two \
    --set janus.see=pairs/ janus.text='text/*.jsonl' janus.draw='shards/*.tar'
Hardware: compiled for v5p:2x2x1, never run; the paper's is 32 nodes of 8 A100 of 40 GB.
Cost: in the paper 14 days for the three stages together.
Expected: not measured here; docs/pictures.md has the stages in small.
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.janus import Janus, JanusConfig
from dsjax.config.posttraining import TuningConfig

config = Janus(
    name="janus_pro_7b_stage2",
    janus=JanusConfig(ratio=(2, 3, 5), trains=("language", "aligner", "drawing")),
    train=TuningConfig(steps=270000, batch_size=520, micro_batch_size=40, remat="full"),
    optim=OptimConfig(learning_rate=1e-4, schedule="constant", warmup_steps=5000, weight_decay=0.0),
    mesh=MeshConfig(data=1, fsdp=-1),
)

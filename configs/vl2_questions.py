r"""Fine-tuning of DeepSeek-VL2 Base on questions about pictures: the tower, the projector and the
language model train together, as in the last stage of the paper (arXiv:2412.10302).

Command: python tools/paint.py configs/vl2_questions.py \
    --init deepseek-vl2 --workdir runs/asked --set janus.see=asked.jsonl
Hardware: never run; a step compiled for v5p:2x2x2 takes 66.0 of 102.8 GB per chip
(docs/records/tpu_compilation_202611.md).
Cost: not measured.
Expected: not measured here; tests/janus/test_seeing.py trains such models in small.
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.janus import Janus, JanusConfig
from dsjax.config.posttraining import TuningConfig

config = Janus(
    name="vl2_questions",
    janus=JanusConfig(ratio=(1, 0, 0), trains=("language", "tower", "aligner")),
    train=TuningConfig(steps=1000, batch_size=64, micro_batch_size=8, remat="full"),
    optim=OptimConfig(
        learning_rate=1e-5, schedule="constant", warmup_steps=50, weight_decay=0.0,
        moment_dtype="bfloat16",
    ),
    mesh=MeshConfig(data=1, expert=8),
)  # fmt: skip

r"""Direct preference optimization of a small model on pairs of answers, for a laptop or CI.

The recipe is DeepSeek LLM's (arXiv:2401.02954, section 4: DPO, one epoch, learning rate 5e-6,
batch 512, warm-up and cosine) with a batch and a rate for a model of a few million parameters.
`preference.kind=bradley_terry` or `pointwise` makes a reward model from the same checkpoint.

Command: python tools/prefer.py configs/dpo_tiny.py --init runs/tiny --workdir runs/dpo_tiny \
    --set preference.files='pairs/*.jsonl'
Hardware: 2 CPU cores, 8 GB of memory.
Cost: about two seconds per step of 8 pairs, and a third of an epoch's time for the reference.
Expected: depends on the pairs; the loss begins at ln 2 = 0.693 and the accuracy near one half.
"""

from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.preference import Preference, PreferenceConfig

config = Preference(
    name="dpo_tiny",
    preference=PreferenceConfig(beta=0.1, sequence_length=256, epochs=1),
    train=TuningConfig(batch_size=8, remat="none", eval_every=50, checkpoint_every=50),
    optim=OptimConfig(
        learning_rate=1e-4, schedule="cosine", warmup_steps=10, final_ratio=0.1, weight_decay=0.0
    ),
    precision=PrecisionConfig(compute="float32"),
)

r"""The helpfulness reward model of DeepSeek-R1: pairs of answers, compared after Bradley and Terry.

Paper: DeepSeek-R1 (arXiv:2501.12948v2, section on reward signals): 66,000 pairs, batch 256,
learning rate 6e-6, one epoch, 8,192 tokens. The safety model has the same figures with 106,000
prompts labelled safe or not: add `--set preference.kind=pointwise`. What is not published is our
choice: a constant rate without warm-up, no weight decay, the layout over devices.

Command: python tools/prefer.py configs/reward_v3.py --init DeepSeek-V3 --workdir runs/reward_v3 \
    --set preference.files=helpful.jsonl.zst
Hardware: weights, gradients and moments take 8 TB, as in pre-training. Not run by us.
Cost: 258 steps of 256 pairs, 1.1G tokens if every row were full.
Expected: not run; the loss begins near ln 2 = 0.693.
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.preference import Preference, PreferenceConfig

config = Preference(
    name="reward_v3",
    preference=PreferenceConfig(kind="bradley_terry", sequence_length=8192, epochs=1),
    train=TuningConfig(batch_size=256, micro_batch_size=128, remat="full"),
    optim=OptimConfig(
        learning_rate=6e-6,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        moment_dtype="bfloat16",
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=64),
)

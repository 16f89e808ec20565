r"""Reinforcement learning on the countdown game, from a toy that has seen demonstrations of it.

Each step asks 16 questions 16 times and updates four times. Advantages without their deviation, the
mean over tokens and a small KL: of what was tried on models of this size, the setting that keeps
the arithmetic right. A model that never finds an answer learns nothing, so begin with a fine-tuned
one. Lines of the files: {"prompt": "5 6 9:20", "numbers": [5, 6, 9], "target": 20}.

Command: python tools/grpo.py configs/grpo_countdown.py --init runs/cold_start \
    --workdir runs/grpo_countdown --set rl.problems='countdown/train.jsonl' \
    rl.heldout='countdown/test.jsonl'
Hardware: 2 CPU cores, 4 GB of memory.
Cost: not measured on an idle machine.
Expected: not trained with this config yet; a prototype of these settings, with 0.7M parameters,
went from 19 to 23 % held-out right answers in 110 steps, with pass@8 kept.
"""

from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.reinforcement import Reinforcement, RlConfig

config = Reinforcement(
    name="grpo_countdown",
    rl=RlConfig(
        prompts=16,
        group_size=16,
        minibatches=4,
        max_new_tokens=96,
        sequence_length=256,
        rewards=("countdown", "format"),
        scale="none",
        average="token",
        beta=0.02,
        log_samples=32,
    ),
    train=TuningConfig(
        steps=110,
        batch_size=4,
        remat="none",
        log_every=1,
        eval_every=20,
        eval_sequences=128,
        checkpoint_every=10,
    ),
    optim=OptimConfig(
        learning_rate=1.5e-4, schedule="cosine", warmup_steps=0, final_ratio=0.0, weight_decay=0.0
    ),
    precision=PrecisionConfig(compute="float32"),
)

r"""TinyZero's setting with GRPO: Qwen2.5-1.5B learns the countdown game on one GPU.

A base model, so the question comes in R1-Zero's template. TinyZero itself is PPO with a critic:
learning rate 1e-6, 256 questions per rollout in minibatches of 64, answers of up to 1,024 tokens,
KL weight 0.001, temperature 1, rewards of 0.1 for the form and 1 for the solution. Here a group of
5 answers takes the critic's place, and epsilon is 0.2. Its data has 3 to 4 numbers per question; a
line is {"prompt": "Using the numbers [19, 36, 55, 7], create an equation that equals 65.",
"numbers": [19, 36, 55, 7], "target": 65}.

Command: python tools/grpo.py configs/grpo_qwen_1_5b.py --init Qwen2.5-1.5B \
    --workdir runs/grpo_qwen_1_5b --set rl.problems='countdown/train.jsonl' \
    rl.heldout='countdown/test.jsonl'
Hardware: one GPU of 80 GB (weights, gradients and two moments in float32, the reference and the
generating copy in bfloat16: 31 GB, and activations).
Cost: not measured; 1,280 answers of up to 1,024 tokens per step.
Expected: TinyZero reports that models of 1.5B parameters and more come to search and to check
their answers, and that one of 0.5B does not.
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.recipes import R1_ZERO_INSTRUCTION
from dsjax.config.reinforcement import Reinforcement, RlConfig

TEMPLATE = f"""{R1_ZERO_INSTRUCTION}
User: {{prompt}} Use each number once, and + - * /. Give the expression in the answer.
Assistant: Let me solve this step by step.
<think>"""

config = Reinforcement(
    name="grpo_qwen_1_5b",
    rl=RlConfig(
        raw=True,
        template=TEMPLATE,
        prompts=256,
        group_size=5,
        minibatches=4,
        max_new_tokens=1024,
        max_batch=256,
        sequence_length=4096,
        rewards=("countdown", "format"),
        beta=0.001,
        eval_samples=1,
    ),
    train=TuningConfig(
        steps=150, batch_size=2, log_every=1, eval_every=10, eval_sequences=256, checkpoint_every=10
    ),
    optim=OptimConfig(
        learning_rate=1e-6, schedule="constant", warmup_steps=0, weight_decay=0.01, beta2=0.999
    ),
    mesh=MeshConfig(data=1),
)

r"""R1-Zero: DeepSeek-V3-Base learns to reason from rewards alone (arXiv:2501.12948).

Published: learning rate 3e-6, KL weight 0.001, 16 answers per question, temperature 1, answers of
up to 32,768 tokens (65,536 from step 8,200 on); a rollout gives 8,192 answers, cut into 16
minibatches, each used once; the reference is replaced every 400 updates; 10,400 updates, 1.6
epochs. A step here is a rollout of 16 updates, so 650 steps, and a reference for 25 of them.
Rewards: right answer and format, equal in weight. Epsilon is not published for R1-Zero; the next
stage's is 10. Ours: meshes, row lengths, and AdamW without decay. A row is split over the 4 chips
of `context`, 9,216 tokens each; a minibatch takes a multiple of 128 rows. Answers come from eight
copies of the weights, 64 chips each.

Command: python tools/grpo.py configs/r1_zero_v3.py --init DeepSeek-V3-Base \
    --workdir runs/r1_zero_v3 --set rl.problems='questions/*.jsonl'
Hardware: 512 TPU v5p, weights in 512 parts along fsdp, expert and context; DeepSeek used 512 H800.
Cost: DeepSeek's run took 198 hours; ours has not been run.
Expected: AIME 2024 pass@1 from 15.6 to 71.0 % (version 1 of the paper), 77.9 % (version 2).
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.mesh import RolloutMeshConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.recipes import R1_ZERO_INSTRUCTION
from dsjax.config.reinforcement import Reinforcement, RlConfig

TEMPLATE = R1_ZERO_INSTRUCTION + " User: {prompt}. Assistant:"

config = Reinforcement(
    name="r1_zero_v3",
    rl=RlConfig(
        raw=True,
        template=TEMPLATE,
        prompts=512,
        group_size=16,
        minibatches=16,
        max_new_tokens=32768,
        max_batch=2048,
        sequence_length=36864,
        rewards=("math", "format"),
        epsilon=10.0,
        beta=0.001,
        reference_every=25,
    ),
    train=TuningConfig(
        steps=650, batch_size=128, log_every=1, eval_every=25, checkpoint_every=5, remat="full"
    ),
    optim=OptimConfig(
        learning_rate=3e-6,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        moment_dtype="bfloat16",
    ),
    mesh=MeshConfig(data=1, fsdp=2, expert=64, context=4),
    rollout_mesh=RolloutMeshConfig(data=2, expert=64, tensor=4),
)

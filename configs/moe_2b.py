"""DeepSeekMoE 2B (0.3B activated): the validation model of the paper.

Paper: DeepSeekMoE (arXiv:2401.06066), section 4 and appendix A. 100B tokens in batches of 2K
sequences of 2,048; the learning rate is multiplied by 0.316 at 80% and at 90% of the tokens;
expert-level balance loss. All 9 layers are MoE, with 1 shared expert and 7 of 63 routed experts per
token. Not released: `dsjax.config.shapes` says what is inferred.

Command: python tools/train.py configs/moe_2b.py --workdir runs/moe_2b \\
    --set data.files='text/*.parquet'
Hardware: weights, gradients and moments are 32 GB: one GPU of 80 GB. Not run by us.
Cost: not published.
Expected: not run; the paper counts 2.0B parameters, 0.3B activated.
"""

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import MOE_2B

config = Config(
    name="moe_2b",
    model=MOE_2B,
    data=DataConfig(sequence_length=2048, fim_rate=0.0),
    train=TrainConfig(
        steps=23_842,
        batch_size=2048,
        micro_batch_size=32,
        bias_update_speed=0.0,
        sequence_balance=0.0,
        expert_balance=0.01,
    ),
    optim=OptimConfig(
        learning_rate=1.08e-3,
        schedule="multistep",
        decay_points=(0.8, 0.9),
        decay_ratios=(0.316, 0.316**2),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

r"""DeepSeekMoE 16B (2.8B activated): the released shape and the pre-training recipe.

Paper: DeepSeekMoE (arXiv:2401.06066), section 5 and appendix A. 2T tokens in 106,449 steps; the
learning rate is multiplied by 0.316 at 80% and at 90% of the tokens; only the expert-level balance
loss, as all experts of a layer are on one device. Multi-head attention; fine-grained experts of a
quarter of a standard feed-forward, 2 of them shared. `micro_batch_size` is our choice; the paper
gives the batch as 4.5K sequences, here 4,608.

Command: python tools/train.py configs/moe_16b.py --workdir runs/moe_16b \
    --set data.files='text/*.parquet' data.tokenizer=deepseek-moe/tokenizer.json
Hardware: weights, gradients and moments are 262 GB, so 8 GPUs of 80 GB or more. Not run by us.
Cost: not published.
Expected: not run; the paper counts 16.4B parameters, 2.8B activated.
"""

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import MOE_16B

config = Config(
    name="moe_16b",
    model=MOE_16B,
    data=DataConfig(sequence_length=4096, fim_rate=0.0),
    train=TrainConfig(
        steps=106_449,
        batch_size=4608,
        micro_batch_size=512,
        bias_update_speed=0.0,
        sequence_balance=0.0,
        expert_balance=0.001,
    ),
    optim=OptimConfig(
        learning_rate=4.2e-4,
        schedule="multistep",
        decay_points=(0.8, 0.9),
        decay_ratios=(0.316, 0.316**2),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

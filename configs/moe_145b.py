r"""DeepSeekMoE 145B (22.2B activated): the preliminary model of the paper.

Paper: DeepSeekMoE (arXiv:2401.06066), section 7 and appendix A. Batches of 4.5K sequences of 4,096,
constant learning rate, expert- and device-level balance losses. Not released: the widths are
inferred (`dsjax.config.shapes`) and give the paper's 144.6B and 22.2B parameters.
`n_balance_devices`, over which the device-level loss counts, `micro_batch_size` and the length of
245B tokens are our choices.

Command: python tools/train.py configs/moe_145b.py --workdir runs/moe_145b \
    --set data.files='text/*.parquet' data.tokenizer=deepseek-moe/tokenizer.json
Hardware: weights, gradients and moments are 2.3 TB, so 64 GPUs of 80 GB or more. Not run by us.
Cost: not published.
Expected: not run; the paper counts 144.6B parameters, 22.2B activated.
"""

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import MOE_145B

config = Config(
    name="moe_145b",
    model=MOE_145B,
    data=DataConfig(sequence_length=4096, fim_rate=0.0),
    train=TrainConfig(
        steps=13_000,
        batch_size=4608,
        micro_batch_size=512,
        bias_update_speed=0.0,
        sequence_balance=0.0,
        expert_balance=0.003,
        device_balance=0.05,
        n_balance_devices=4,
    ),
    optim=OptimConfig(
        learning_rate=3.0e-4,
        schedule="constant",
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

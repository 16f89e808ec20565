r"""DeepSeek-V2, 236B: the released shape and the pre-training recipe.

Paper: DeepSeek-V2 (arXiv:2405.04434), sections 2 and 3.1. 8.1T tokens; the learning rate is
multiplied by 0.316 at 60% and at 90% of the tokens; the batch of 2,304 sequences grows to 9,216
over the first 225B tokens (the ramp fraction is that, in steps). Expert-, device- and
communication-level balance losses with the paper's factors; no bias, no MTP. We depart from the
paper in that no token is dropped; it drops tokens above a device's capacity in training.

The published configs disagree about YaRN: this model's have mscale = mscale_all_dim = 0.707, those
of Coder-V2 and V2.5 (same shape) 1.0, and DeepSeek's own inference config omits the field. This
config has the first; a converted checkpoint keeps its own. Pre-training at 4,096 tokens ran without
YaRN: add `--set model.rope_scaling=none`. `micro_batch_size` and the plain fsdp layout are our
choices.

Command: python tools/train.py configs/v2_236b.py --workdir runs/v2 --set model.rope_scaling=none \
    data.files='text/*.parquet' data.tokenizer=deepseek-v2/tokenizer.json
Hardware: the paper used H800 clusters; weights, gradients and moments alone are 3.8 TB. Not run by
  us.
Cost: 172.8K H800-hours per trillion tokens (paper, section 3.2.3).
Expected: not run.
"""

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import V2

config = Config(
    name="v2_236b",
    model=V2,
    data=DataConfig(sequence_length=4096, fim_rate=0.0),
    train=TrainConfig(
        steps=218_154,
        batch_size=9216,
        batch_size_start=2304,
        batch_ramp_fraction=0.0437,
        micro_batch_size=1152,
        bias_update_speed=0.0,
        sequence_balance=0.0,
        expert_balance=0.003,
        device_balance=0.05,
        communication_balance=0.02,
    ),
    optim=OptimConfig(
        learning_rate=2.4e-4,
        schedule="multistep",
        decay_points=(0.6, 0.9),
        decay_ratios=(0.316, 0.316**2),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

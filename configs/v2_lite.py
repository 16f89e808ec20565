"""DeepSeek-V2-Lite, 15.7B (2.4B activated): the released shape and the pre-training recipe.

Paper: DeepSeek-V2 (arXiv:2405.04434), appendix B. 5.7T tokens in batches of 4,608 sequences; the
learning rate is multiplied by 0.316 at 80% and at 90% of the tokens; only the expert-level balance
loss. MLA without a query latent; the 6 best experts by softmax, weights not normalized, no groups.

The rope fields are those of the released checkpoint (YaRN, mscale 0.707). Pre-training at 4,096
tokens ran without YaRN: add `--set model.rope_scaling=none`. `micro_batch_size` is our choice.

Command: python tools/train.py configs/v2_lite.py --workdir runs/v2_lite \
    --set model.rope_scaling=none data.files='text/*.parquet' data.tokenizer=v2-lite/tokenizer.json
Hardware: weights, gradients and moments are 251 GB, so 8 GPUs of 80 GB or more. Not run by us.
Cost: 9.4e22 FLOPs (16.4 G per token).
Expected: not run; `tools/show.py` gives 15,706,484,224 parameters.
"""

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import V2_LITE

config = Config(
    name="v2_lite",
    model=V2_LITE,
    data=DataConfig(sequence_length=4096, fim_rate=0.0),
    train=TrainConfig(
        steps=301_996,
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

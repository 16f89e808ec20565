r"""DeepSeek-V3 and R1, 671B: the released shape and the pre-training recipe.

Paper: DeepSeek-V3 (arXiv:2412.19437), sections 2 and 4.2. 14.8T tokens. The learning rate is
constant up to 10T, follows a cosine to a tenth over 4.3T, and ends with two constant parts. The
batch of 3,072 sequences grows to 15,360 over the first 469B tokens (the ramp fraction is that, in
steps). Adam moments in bfloat16; MTP weight 0.3 up to 10T tokens, then 0.1; no bias update during
the last 500B.

The rope fields are those of the released checkpoint, whose context was extended to 128K with YaRN.
Pre-training at 4,096 tokens ran without it: add `--set model.rope_scaling=none`.
`micro_batch_size`, `remat` and the layout over devices are our choices: 64-way expert parallelism
as in the paper; the remaining devices split weights and optimizer state (fsdp). The paper has 16
pipeline stages instead; for those add `--set mesh.pipe=16 mesh.fsdp=1 train.micro_batch_size=0
mesh.microbatches=64`. `docs/plan.md` has the TPU compiler's figures for both.

Command: python tools/train.py configs/v3_671b.py --workdir runs/v3 --set model.rope_scaling=none \
    data.files='text/*.parquet' data.tokenizer=deepseek-v3/tokenizer.json
Hardware: the paper used 2,048 H800; weights, gradients and moments alone are 8 TB. Not run by us.
Cost: 2.664M H800-hours for pre-training (paper, table 1).
Expected: not run; `tools/show.py` gives 671,026,419,200 parameters and 37,552,297,472 activated.
"""

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import V3

# The rest of V3's recipe, from the bias update to the schedule, are the defaults.
config = Config(
    name="v3_671b",
    model=V3,
    data=DataConfig(sequence_length=4096, fim_rate=0.1),
    train=TrainConfig(
        steps=240_209,
        batch_size=15360,
        batch_size_start=3072,
        batch_ramp_fraction=0.0517,
        micro_batch_size=512,
        remat="full",
    ),
    optim=OptimConfig(moment_dtype="bfloat16"),
    mesh=MeshConfig(data=1, fsdp=-1, expert=64),
)

r"""DeepSeek-V3.2, 671B: the released shape, and the sparse stage of its continued pre-training.

Papers: V3.2-Exp and V3.2 (arXiv:2512.02556), section 2.1. It begins with V3.1 after its context was
extended to 128K, plus an indexer per layer. Two stages, sequences of 131,072 tokens:
1. warm-up: the indexers alone, to predict dense attention; 1,000 steps of 16 sequences, 1e-3;
2. sparse, this config: all parameters, the indexers to predict attention to the 2,048 keys that
   they chose; 15,000 steps of 480 sequences, 7.3e-6.

The layout over devices, `micro_batch_size` and `remat` are our choices.

Command: python tools/train.py configs/v3_2_671b.py --init runs/v3_2_indexer \
    --workdir runs/v3_2 --set data.files='text/*.parquet'
Hardware: DeepSeek's is not published for these stages. The mesh is for 512 TPU v5p, of 103 GB
    each; the compiler gives the sparse stage 49.1 and the warm-up 39.4. Not run by us.
Cost: 943.7B tokens, and 2.1B for the warm-up: `--init DeepSeek-V3.1 --set train.indexer=warmup
    train.steps=1000 train.batch_size=16 optim.learning_rate=1e-3`.
Expected: not run; `tools/show.py` gives 671,877,944,064 parameters, 851,524,864 of them indexers'.
"""

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import V3_2

config = Config(
    name="v3_2_671b",
    model=V3_2,
    data=DataConfig(sequence_length=131072, fim_rate=0.0),
    train=TrainConfig(
        steps=15_000,
        batch_size=480,
        micro_batch_size=16,
        mtp_weight=0.1,
        bias_update_speed=0.0,
        remat="full",
    ),
    optim=OptimConfig(
        learning_rate=7.3e-6, schedule="constant", warmup_steps=0, moment_dtype="bfloat16"
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=16, context=32),
)

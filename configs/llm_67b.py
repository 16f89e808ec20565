r"""DeepSeek LLM 67B: the released shape and the pre-training recipe.

Paper: DeepSeek LLM (arXiv:2401.02954), sections 2.2 and 2.3, table 2. Dense, grouped-query
attention with 8 key-value heads. 2T tokens in batches of 4,608 sequences of 4,096; the learning
rate is 3.2e-4 up to 80% of the tokens, 31.6% of that up to 90%, and 10% to the end.
`micro_batch_size` is our choice.

Command: python tools/train.py configs/llm_67b.py --workdir runs/llm_67b \
    --set data.files='text/*.parquet' data.tokenizer=deepseek-llm/tokenizer.json
Hardware: weights, gradients and moments are 1.1 TB, so 32 GPUs of 80 GB or more. Not run by us.
Cost: 300.6K H800-hours per trillion tokens (DeepSeek-V2 paper, section 3.2.3).
Expected: not run.
"""

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import LLM_67B

config = Config(
    name="llm_67b",
    model=LLM_67B,
    data=DataConfig(sequence_length=4096, fim_rate=0.0),
    train=TrainConfig(steps=105_964, batch_size=4608, micro_batch_size=256),
    optim=OptimConfig(
        learning_rate=3.2e-4,
        schedule="multistep",
        decay_points=(0.8, 0.9),
        decay_ratios=(0.316, 0.1),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

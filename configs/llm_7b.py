r"""DeepSeek LLM 7B: the released shape and the pre-training recipe.

Paper: DeepSeek LLM (arXiv:2401.02954), sections 2.2 and 2.3, table 2. Dense, multi-head attention.
2T tokens in batches of 2,304 sequences of 4,096; the learning rate is 4.2e-4 up to 80% of the
tokens, 31.6% of that up to 90%, and 10% to the end. `micro_batch_size` is our choice.

Command: python tools/train.py configs/llm_7b.py --workdir runs/llm_7b \
    --set data.files='text/*.parquet' data.tokenizer=deepseek-llm/tokenizer.json
Hardware: weights, gradients and moments are 111 GB, so 4 GPUs of 80 GB or more. Not run by us.
Cost: 8.5e22 FLOPs (paper, section 3: 42.3 GFLOPs per token without embeddings).
Expected: not run.
"""

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import LLM_7B

config = Config(
    name="llm_7b",
    model=LLM_7B,
    data=DataConfig(sequence_length=4096, fim_rate=0.0),
    train=TrainConfig(steps=211_928, batch_size=2304, micro_batch_size=256),
    optim=OptimConfig(
        learning_rate=4.2e-4,
        schedule="multistep",
        decay_points=(0.8, 0.9),
        decay_ratios=(0.316, 0.1),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

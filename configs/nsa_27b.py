r"""NSA 27B: native sparse attention, trained from scratch, in the shape of its paper.

Paper: Native Sparse Attention (arXiv:2502.11089), section 4.1: 30 layers of width 2,560, 64 heads
in 4 groups with keys of 192 and values of 128 channels, 72 routed and 2 shared experts of which 6
are used, the first layer dense; 270B tokens in sequences of 8,192. Blocks of 32 tokens every 16 are
compressed, 16 blocks of 64 selected, 512 tokens always seen. Not released: vocabulary, expert
width, batch and learning rate are our choices, the last two DeepSeekMoE 16B's, in tokens. What else
the paper leaves open is in `dsjax.model.nsa`.

Command: python tools/train.py configs/nsa_27b.py --workdir runs/nsa_27b \
    --set data.files='text/*.parquet' data.tokenizer=deepseek-llm/tokenizer.json
Hardware: weights, gradients and moments are 430 GB, so 16 GPUs of 80 GB or more. Not run by us.
Cost: not published.
Expected: not run; the paper counts 27B parameters.
"""

from dsjax.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from dsjax.config.shapes import NSA_27B

config = Config(
    name="nsa_27b",
    model=NSA_27B,
    data=DataConfig(sequence_length=8192, fim_rate=0.0),
    train=TrainConfig(
        steps=14_300,
        batch_size=2304,
        micro_batch_size=128,
        bias_update_speed=0.0,
        sequence_balance=0.0,
        expert_balance=0.001,
    ),
    optim=OptimConfig(
        learning_rate=4.2e-4,
        schedule="multistep",
        decay_points=(0.8, 0.9),
        decay_ratios=(0.316, 0.1),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)

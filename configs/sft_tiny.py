r"""Fine-tuning of the tiny model (`configs/tiny.py`) on conversations, for a laptop or CI.

The tiny model's tokenizer is a base model's, without tokens for turns, so the files hold prompts
and completions as texts. A model with a chat format takes messages too.

Command: python tools/sft.py configs/sft_tiny.py --init runs/tiny --workdir runs/sft_tiny \
    --set sft.files='chats/*.jsonl'
Hardware: 2 CPU cores, 8 GB of memory.
Cost: about a second per step, two passes over the conversations.
Expected: depends on the conversations; the held-out loss falls from the base model's.
"""

from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.finetuning import FineTuning, SftConfig
from dsjax.config.posttraining import TuningConfig

config = FineTuning(
    name="sft_tiny",
    sft=SftConfig(sequence_length=256, epochs=2, heldout_fraction=0.05),
    train=TuningConfig(batch_size=8, remat="none", eval_every=50, checkpoint_every=50),
    optim=OptimConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=10, final_ratio=0.1),
    precision=PrecisionConfig(compute="float32"),
)

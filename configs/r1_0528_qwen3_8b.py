r"""DeepSeek-R1-0528-Qwen3-8B: the released shape, and R1's fine-tuning recipe.

Paper: none. The model card says that Qwen3-8B-Base was fine-tuned on chains of thought of
DeepSeek-R1-0528; data and settings were not published. So this is the recipe of R1's six distills
(arXiv:2501.12948, section 2.4; `dsjax.config.recipes`) at the rate of its 7B. Qwen3's shape: each
head's query and key is normed, and there are no biases. YaRN stretches 32,768 tokens by 4; its
temperature is on cos and sin, as transformers computes it from the released config.json, whose
`attn_factor` it passes over.

To fine-tune the base model, use `configs/distill_qwen3_8b.py`. This config trains the same
shape from scratch, and gives it to tools/show.py and tools/plan.py.

Command: python tools/train.py configs/r1_0528_qwen3_8b.py --workdir runs/r1_0528_qwen3_8b \
    --set data.files='samples/*.jsonl' data.tokenizer=r1-0528/tokenizer.json
Hardware: weights, gradients and moments are 131 GB, so 4 GPUs of 80 GB or more. Not run by us.
Cost: not published.
Expected: not run.
"""

from dsjax.config.recipes import r1_distillation
from dsjax.config.shapes import QWEN3_8B

config = r1_distillation("r1_0528_qwen3_8b", QWEN3_8B, learning_rate=8e-5)

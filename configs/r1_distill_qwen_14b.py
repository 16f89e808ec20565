r"""DeepSeek-R1-Distill-Qwen-14B: the released shape and the fine-tuning recipe.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement. Qwen2.5-14B fine-tuned on
about 800K samples of R1; cosine from 7e-5 to a tenth. The rest of the recipe, which all six
distills share, and our choices in it are in `dsjax.config.recipes`. Qwen2's shape: biases on
queries, keys and values, with a norm epsilon of 1e-5 and a rope theta of 1e6, unlike the two
smaller models.

To fine-tune the base model, use `configs/distill_qwen_14b.py`. This config trains the same
shape from scratch, and gives it to tools/show.py and tools/plan.py.

Command: python tools/train.py configs/r1_distill_qwen_14b.py --workdir runs/r1_distill_qwen_14b \
    --set data.files='samples/*.jsonl' data.tokenizer=r1-distill/tokenizer.json
Hardware: weights, gradients and moments are 236 GB, so 8 GPUs of 80 GB or more. Not run by us.
Cost: not published.
Expected: not run.
"""

from dsjax.config.recipes import r1_distillation
from dsjax.config.shapes import QWEN_14B

config = r1_distillation("r1_distill_qwen_14b", QWEN_14B, learning_rate=7e-5)

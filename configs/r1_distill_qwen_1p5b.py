r"""DeepSeek-R1-Distill-Qwen-1.5B: the released shape and the fine-tuning recipe.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement. Qwen2.5-Math-1.5B fine-tuned
on about 800K samples of R1; cosine from 1e-4 to a tenth. The rest of the recipe, which all six
distills share, and our choices in it are in `dsjax.config.recipes`. Qwen2's shape: biases on
queries, keys and values; the head is untied, unlike the base model's.

To fine-tune the base model, use `configs/distill_qwen_1_5b.py`. This config trains the same
shape from scratch, and gives it to tools/show.py and tools/plan.py.

Command: python tools/train.py configs/r1_distill_qwen_1p5b.py --workdir runs/r1_distill_qwen_1p5b \
    --set data.files='samples/*.jsonl' data.tokenizer=r1-distill/tokenizer.json
Hardware: weights, gradients and moments are 28 GB, so one GPU of 80 GB. Not run by us.
Cost: not published.
Expected: not run.
"""

from dsjax.config.recipes import r1_distillation
from dsjax.config.shapes import QWEN_1P5B

config = r1_distillation("r1_distill_qwen_1p5b", QWEN_1P5B, learning_rate=1e-4)

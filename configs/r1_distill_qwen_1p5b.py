r"""DeepSeek-R1-Distill-Qwen-1.5B: the released shape and the fine-tuning recipe.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement. Qwen2.5-Math-1.5B fine-tuned
on about 800K samples of R1; cosine from 1e-4 to a tenth. The rest of the recipe, which all six
distills share, and our choices in it are in `dsjax.config.recipes`. Qwen2's shape: biases on
queries, keys and values; the head is untied, unlike the base model's.

To reproduce it, two things are missing: the samples were not released, and this trains from
scratch, because starting from a converted checkpoint is not supported yet.

Command: python tools/train.py configs/r1_distill_qwen_1p5b.py --workdir runs/r1_distill_qwen_1p5b \
    --set data.files='samples/*.jsonl' data.tokenizer=r1-distill/tokenizer.json
Hardware: weights, gradients and moments are 28 GB, so one GPU of 80 GB. Not run by us.
Cost: not published.
Expected: not run.
"""

from dsjax.config.recipes import r1_distillation
from dsjax.config.shapes import QWEN_1P5B

config = r1_distillation("r1_distill_qwen_1p5b", QWEN_1P5B, learning_rate=1e-4)

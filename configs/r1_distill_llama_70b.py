r"""DeepSeek-R1-Distill-Llama-70B: the released shape and the fine-tuning recipe.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement. Llama-3.3-70B-Instruct
fine-tuned on about 800K samples of R1; cosine from 2e-5 to a tenth. The rest of the recipe, which
all six distills share, and our choices in it are in `dsjax.config.recipes`. Llama 3.1's rope
scaling.

To fine-tune the base model, use `configs/distill_llama_70b.py`. This config trains the same
shape from scratch, and gives it to tools/show.py and tools/plan.py.

Command: python tools/train.py configs/r1_distill_llama_70b.py --workdir runs/r1_distill_llama_70b \
    --set data.files='samples/*.jsonl' data.tokenizer=r1-distill/tokenizer.json
Hardware: weights, gradients and moments are 1.1 TB, so 32 GPUs of 80 GB or more. Not run by us.
Cost: not published.
Expected: not run.
"""

from dsjax.config.recipes import r1_distillation
from dsjax.config.shapes import LLAMA_70B

config = r1_distillation("r1_distill_llama_70b", LLAMA_70B, learning_rate=2e-5)

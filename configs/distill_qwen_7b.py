r"""DeepSeek-R1-Distill-Qwen-7B: a student fine-tuned on R1's answers.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement: Qwen2.5-Math-7B on about 800K
samples, 2 to 3 epochs, cosine from 8e-5 to a tenth, batches of 64, 32,768 tokens. What all six
students share, and our choices in it, are in `dsjax.config.recipes`. The samples were not released;
open collections of R1's answers take their place.

The base model's config says that it reads 4,096 tokens, the student's 131,072. So import it first:
  python tools/convert.py import Qwen2.5-Math-7B qwen-base \
      --override max_position_embeddings=131072

Command: python tools/sft.py configs/distill_qwen_7b.py --init qwen-base \
    --workdir runs/distill_qwen_7b --set sft.files='samples/*.jsonl' \
    sft.tokenizer=DeepSeek-R1-Distill-Qwen-7B
Hardware: weights, gradients and moments are 122 GB, so 4 GPUs of 80 GB or more. Not run by us.
Cost: 3.9e+20 FLOPs without attention (two epochs of 804,745 samples of 5,355 tokens).
Expected: not run; the paper's student reaches 55.5 on AIME 2024 and 92.8 on MATH-500 (pass@1).
"""

from dsjax.config.recipes import distillation

config = distillation("distill_qwen_7b", learning_rate=8e-5)

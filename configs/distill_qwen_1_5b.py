r"""DeepSeek-R1-Distill-Qwen-1.5B: a student fine-tuned on R1's answers.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement: Qwen2.5-Math-1.5B on about
800K samples, 2 to 3 epochs, cosine from 1e-4 to a tenth, batches of 64, 32,768 tokens. What all six
students share, and our choices in it, are in `dsjax.config.recipes`. The samples were not released;
open collections of R1's answers take their place. The base model's head is tied to its embedding
and stays so; the released student's is not.

The base model's config says that it reads 4,096 tokens, the student's 131,072. So import it first:
  python tools/convert.py import Qwen2.5-Math-1.5B qwen-base \
      --override max_position_embeddings=131072

Command: python tools/sft.py configs/distill_qwen_1_5b.py --init qwen-base \
    --workdir runs/distill_qwen_1_5b --set sft.files='samples/*.jsonl' \
    sft.tokenizer=DeepSeek-R1-Distill-Qwen-1.5B
Hardware: weights, gradients and moments are 28 GB, so one GPU of 80 GB. Not run by us.
Cost: 8.0e+19 FLOPs without attention (two epochs of 804,745 samples of 5,355 tokens).
Expected: not run; the paper's student reaches 28.9 on AIME 2024 and 83.9 on MATH-500 (pass@1).
"""

from dsjax.config.recipes import distillation

config = distillation("distill_qwen_1_5b", learning_rate=1e-4)

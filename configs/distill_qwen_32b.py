r"""DeepSeek-R1-Distill-Qwen-32B: a student fine-tuned on R1's answers.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement: Qwen2.5-32B on about 800K
samples, 2 to 3 epochs, cosine from 6e-5 to a tenth, batches of 64, 32,768 tokens. What all six
students share, and our choices in it, are in `dsjax.config.recipes`. The samples were not released;
open collections of R1's answers take their place.

Command: python tools/sft.py configs/distill_qwen_32b.py --init Qwen2.5-32B \
    --workdir runs/distill_qwen_32b --set sft.files='samples/*.jsonl' \
    sft.tokenizer=DeepSeek-R1-Distill-Qwen-32B
Hardware: weights, gradients and moments are 524 GB, so 16 GPUs of 80 GB or more. Not run by us.
Cost: 1.7e+21 FLOPs without attention (two epochs of 804,745 samples of 5,355 tokens).
Expected: not run; the paper's student reaches 72.6 on AIME 2024 and 94.3 on MATH-500 (pass@1).
"""

from dsjax.config.recipes import distillation

config = distillation("distill_qwen_32b", learning_rate=6e-5)

r"""DeepSeek-R1-Distill-Llama-8B: a student fine-tuned on R1's answers.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement: Llama-3.1-8B on about 800K
samples, 2 to 3 epochs, cosine from 5e-5 to a tenth, batches of 64, 32,768 tokens. What all six
students share, and our choices in it, are in `dsjax.config.recipes`. The samples were not released;
open collections of R1's answers take their place.

Command: python tools/sft.py configs/distill_llama_8b.py --init Llama-3.1-8B \
    --workdir runs/distill_llama_8b --set sft.files='samples/*.jsonl' \
    sft.tokenizer=DeepSeek-R1-Distill-Llama-8B
Hardware: weights, gradients and moments are 128 GB, so 4 GPUs of 80 GB or more. Not run by us.
Cost: 4.2e+20 FLOPs without attention (two epochs of 804,745 samples of 5,355 tokens).
Expected: not run; the paper's student reaches 50.4 on AIME 2024 and 89.1 on MATH-500 (pass@1).
"""

from dsjax.config.recipes import distillation

config = distillation("distill_llama_8b", learning_rate=5e-5)

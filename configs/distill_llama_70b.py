r"""DeepSeek-R1-Distill-Llama-70B: a student fine-tuned on R1's answers.

Paper: DeepSeek-R1 (arXiv:2501.12948), section 2.4 and the supplement: Llama-3.3-70B-Instruct on
about 800K samples, 2 to 3 epochs, cosine from 2e-5 to a tenth, batches of 64, 32,768 tokens. What
all six students share, and our choices in it, are in `dsjax.config.recipes`. The samples were not
released; open collections of R1's answers take their place.

Command: python tools/sft.py configs/distill_llama_70b.py --init Llama-3.3-70B-Instruct \
    --workdir runs/distill_llama_70b --set sft.files='samples/*.jsonl' \
    sft.tokenizer=DeepSeek-R1-Distill-Llama-70B
Hardware: weights, gradients and moments are 1.1 TB, so 32 GPUs of 80 GB or more. Not run by us.
Cost: 3.6e+21 FLOPs without attention (two epochs of 804,745 samples of 5,355 tokens).
Expected: not run; the paper's student reaches 70.0 on AIME 2024 and 94.5 on MATH-500 (pass@1).
"""

from dsjax.config.recipes import distillation

config = distillation("distill_llama_70b", learning_rate=2e-5)

r"""DeepSeek-R1-0528-Qwen3-8B: a student fine-tuned on the answers of DeepSeek-R1-0528.

Paper: none. The model card says that the student is Qwen3-8B-Base; data and settings were not
published. So this is the recipe of R1's six students (arXiv:2501.12948, section 2.4: batches of 64,
32,768 tokens, 2 epochs, cosine to a tenth; `dsjax.config.recipes`) at the rate of the 7B.

The base model's config says that it reads 32,768 tokens, the student's 131,072 with YaRN. The
student is trained with the scaling that it is published with. So import the base model first:
  python tools/convert.py import Qwen3-8B-Base qwen3-base \
      --override max_position_embeddings=131072 'rope_scaling={"rope_type": "yarn", "factor": 4.0,
      "original_max_position_embeddings": 32768}'

Command: python tools/sft.py configs/distill_qwen3_8b.py --init qwen3-base \
    --workdir runs/distill_qwen3_8b --set sft.files='samples/*.jsonl' \
    sft.tokenizer=DeepSeek-R1-0528-Qwen3-8B
Hardware: weights, gradients and moments are 131 GB, so 4 GPUs of 80 GB or more. Not run by us.
Cost: 4.2e+20 FLOPs without attention (two epochs of 804,745 samples of 5,355 tokens).
Expected: not run; the model card's student reaches 86.0 on AIME 2024 and 76.3 on AIME 2025
(pass@1).
"""

from dsjax.config.recipes import distillation

config = distillation("distill_qwen3_8b", learning_rate=8e-5)

r"""Expert-specialized fine-tuning of DeepSeek-V2-Lite: only the experts that a task uses train.

Paper: ESFT (arXiv:2407.01906), section 4: sequences of 4,096 tokens, batches of 32, 500 steps at
1e-5, gate scores to a threshold of 0.1 (token scores: `--set esft.score=token esft.threshold=0.2`).
Which experts were chosen is in esft.json of the run, in the form of the authors' expert configs.

Command: python tools/sft.py configs/esft_v2_lite.py --init DeepSeek-V2-Lite \
    --workdir runs/esft_law --set sft.files=law.jsonl
Hardware: weights and gradients of the chosen experts; float32 masters are 63 GB and moments of all
experts 116 GB, so 4 GPUs of 80 GB. Not run by us.
Cost: 66M tokens, 9.4e17 FLOPs.
Expected: not run; the paper's averages over its tasks are 50.2 (gate) and 49.4 (token), against
51.0 of full fine-tuning and 44.9 of LoRA; general abilities fall less than with either.
"""

from dsjax.config import MeshConfig, OptimConfig
from dsjax.config.finetuning import EsftConfig, FineTuning, SftConfig
from dsjax.config.posttraining import TuningConfig

config = FineTuning(
    name="esft_v2_lite",
    sft=SftConfig(sequence_length=4096),
    esft=EsftConfig(score="gate", threshold=0.1, sample_rows=32),
    train=TuningConfig(steps=500, batch_size=32, micro_batch_size=8),
    optim=OptimConfig(learning_rate=1e-5, schedule="constant", warmup_steps=0),
    mesh=MeshConfig(data=1, fsdp=-1),
)

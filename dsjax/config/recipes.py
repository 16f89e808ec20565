"""Recipes that several published models share."""

from dsjax.config.data import DataConfig
from dsjax.config.finetuning import FineTuning, SftConfig
from dsjax.config.mesh import MeshConfig
from dsjax.config.model import ModelConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.pretraining import Config
from dsjax.config.train import OptimConfig, TrainConfig

# What R1-Zero's base model is told before each question (arXiv:2501.12948, table 1).
R1_ZERO_INSTRUCTION = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>."
)


def r1_distillation(name: str, model: ModelConfig, learning_rate: float) -> Config:
    """Returns the fine-tuning of the six R1 distills (arXiv:2501.12948, section 2.4).

    About 800K samples of R1, 2 to 3 epochs, batches of 64 sequences of 32,768 tokens, cosine from
    `learning_rate` to a tenth. Our choices: two epochs (804,745 samples of 5,355 tokens on average,
    packed and isolated), no warm-up, which is not published, and `micro_batch_size`.
    """
    return Config(
        name=name,
        model=model,
        data=DataConfig(sequence_length=32768, fim_rate=0.0, isolate_documents=True),
        train=TrainConfig(steps=4110, batch_size=64, micro_batch_size=16),
        optim=OptimConfig(
            learning_rate=learning_rate,
            warmup_steps=0,
            decay_points=(0.0, 1.0, 1.0),  # the cosine fills the run
            decay_ratios=(0.1, 0.1),
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def distillation(name: str, learning_rate: float) -> FineTuning:
    """Returns the same fine-tuning of a checkpoint, `--init`: the recipe of the six R1 distills.

    R1's conversations hold its thoughts, so the format is R1's, whatever template the base model
    has; its tokenizer needs the tokens, see `sft.tokenizer`.
    """
    return FineTuning(
        name=name,
        sft=SftConfig(sequence_length=32768, format="R1", epochs=2, heldout_fraction=0.002),
        train=TuningConfig(batch_size=64, micro_batch_size=16),
        optim=OptimConfig(
            learning_rate=learning_rate, schedule="cosine", warmup_steps=0, final_ratio=0.1
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )

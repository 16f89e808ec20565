"""R1's pipeline on the countdown game, with a model of V3's shape of 0.7M parameters.

Three numbers from 1 to 14, added and subtracted to a target. The stages are those of the paper
(DeepSeek-R1, arXiv:2501.12948): a base model; R1-Zero, by rewards alone; a cold start on
demonstrations; reasoning by rewards; rejection sampling and fine-tuning of the base model; rewards
for all scenarios, here a taste for tidy thoughts as well; and a dense student that learns from the
samples. The demonstrator of the cold start tries without aim and is right 43 % of the time.

Command: python tools/r1.py --workdir runs/r1_tiny
Hardware: 2 CPU cores, 4 GB of memory.
Cost: 30 minutes of processor time; 29 minutes beside other work.
Expected: right answers to held-out problems after each stage: 25, 42, 37, 65, 73, 72, 13, 64 %
(means of three seeds, docs/r1.md).
"""

from pathlib import Path

from dsjax.config import Config, DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
from dsjax.config.finetuning import FineTuning, SftConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.r1 import R1, Game, Samples, Stage
from dsjax.config.reinforcement import Reinforcement, RlConfig

FLOAT32 = PrecisionConfig(compute="float32")
MODEL = ModelConfig(
    vocab_size=128,
    max_seq_len=256,
    dim=128,
    n_layers=3,
    n_dense_layers=1,
    n_heads=4,
    inter_dim=384,
    init_std=0.03,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    n_shared_experts=1,
    n_activated_experts=2,
    moe_inter_dim=64,
    n_expert_groups=2,
    n_limited_groups=1,
    score_func="sigmoid",
    group_score="top2",
    router_bias=True,
    norm_topk=True,
    n_mtp=1,
)
# A dense student: grouped-query attention as in Qwen2, and no experts.
STUDENT = ModelConfig(
    attention="gqa",
    vocab_size=128,
    max_seq_len=256,
    dim=96,
    n_layers=3,
    n_dense_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=24,
    inter_dim=288,
    init_std=0.03,
)


def pretraining(name: str, model: ModelConfig, steps: int) -> Config:
    return Config(
        name=name,
        model=model,
        data=DataConfig(
            files="{run}/game/base.jsonl",
            tokenizer="{run}/game/tokenizer.json",
            sequence_length=127,
            fim_rate=0.0,
            isolate_documents=True,
        ),
        train=TrainConfig(
            steps=steps,
            batch_size=8,
            remat="none",
            bias_update_speed=0.01,
            eval_every=0,
            checkpoint_every=200,
            sample_tokens=0,
        ),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=30),
        precision=FLOAT32,
    )


def fine_tuning(name: str, files: str, steps: int) -> FineTuning:
    return FineTuning(
        name=name,
        sft=SftConfig(files=files, sequence_length=127),
        train=TuningConfig(
            steps=steps, batch_size=8, remat="none", eval_every=0, checkpoint_every=200
        ),
        optim=OptimConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=20),
        precision=FLOAT32,
    )


def by_rewards(name: str, steps: int, rewards: tuple[str, ...]) -> Reinforcement:
    rl = RlConfig(
        problems="{run}/game/problems.jsonl",
        rewards=rewards,
        prompts=16,
        group_size=16,
        max_new_tokens=112,
        scale="none",
        average="token",
        beta=0.02,
        log_samples=16,
    )
    return Reinforcement(
        name=name,
        rl=rl,
        train=TuningConfig(
            steps=steps, batch_size=32, remat="none", eval_every=0, checkpoint_every=20, log_every=1
        ),
        # Much faster, and the model forgets its sums while it learns to go on.
        optim=OptimConfig(
            learning_rate=1.5e-4, schedule="cosine", warmup_steps=5, weight_decay=0.0
        ),
        precision=FLOAT32,
    )


RULES = ("countdown", "format")
TIDY = f"{Path(__file__).parents[1] / 'rewards' / 'tidy.py'}:tidy"

config = R1(
    name="r1_tiny",
    game=Game(),
    problems="{run}/game/held_out.jsonl",
    n=8,
    max_new_tokens=112,
    stages=(
        Stage(name="base", config=pretraining("base", MODEL, 1200)),
        Stage(name="r1_zero", init="base", config=by_rewards("r1_zero", 40, RULES)),
        Stage(
            name="cold_start",
            init="base",
            config=fine_tuning("cold_start", "{run}/game/cold_start.jsonl", 250),
        ),
        Stage(name="reasoning", init="cold_start", config=by_rewards("reasoning", 45, RULES)),
        Stage(
            name="rejection",
            init="base",
            samples=Samples(stage="reasoning", problems="{run}/game/problems.jsonl", n=4),
            config=fine_tuning("rejection", "{run}/rejection/samples.jsonl", 250),
        ),
        Stage(
            name="scenarios",
            init="rejection",
            config=by_rewards("scenarios", 20, (*RULES, TIDY)),
        ),
        Stage(name="student", config=pretraining("student", STUDENT, 500)),
        Stage(
            name="distilled",
            init="student",
            samples=Samples(stage="scenarios", problems="{run}/game/problems.jsonl", n=4),
            config=fine_tuning("distilled", "{run}/distilled/samples.jsonl", 400),
        ),
    ),
)

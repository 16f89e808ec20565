"""A GRPO step of a small V3 shape against TRL's, on this machine, in one run, one thread each.

687 thousand parameters as a language model of bytes (width 128, 3 layers of which 1 dense, MLA, 8
experts top-2), float32; both sides read the same folder. 8 questions of the countdown game, 16
answers each, of at most 72 tokens, a KL against a reference, one update. The weights are random, so
most answers run to the limit and none is right; what is timed does not depend on that. The sides
take turns as processes, each bound to one core with one thread, and the medians of their steps are
printed: rollout, log-probabilities of the reference, update with the optimizer, the whole step.

    python -m tests.bench.bench_grpo          both sides, and the ratios
    python -m tests.bench.bench_grpo dsjax    one side alone, as JSON
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, ROUNDS = 8, 2
QUESTIONS, GROUP, NEW, BETA = 8, 16, 72, 0.02
NAMES = ("rollout", "reference", "update", "step")


def write_model(folder: Path) -> None:
    """Writes random weights, the tokenizer and questions."""
    from dsjax.config import ModelConfig
    from tests.bench.sides import V3_ROUTING, case, transformers_model
    from tests.posttrain import toy
    from tests.text import released

    shape = ModelConfig(
        vocab_size=toy.VOCAB_SIZE, dim=128, n_layers=3, n_dense_layers=1, n_heads=4, inter_dim=352,
        q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
        n_routed_experts=8, n_shared_experts=1, n_activated_experts=2, moe_inter_dim=64,
        n_expert_groups=2, n_limited_groups=1, max_seq_len=256, **V3_ROUTING,
    )  # fmt: skip
    model = transformers_model(case("toy", shape, 1, 256, "float32"))
    model.save_pretrained(folder)
    released.write_checkpoint(folder, toy.CONTROL["base"])
    lines = [{"prompt": f"{n} 6 9:2{n}=", "numbers": [n, 6, 9], "target": 20 + n} for n in range(8)]
    toy.write_lines(folder / "questions.jsonl", lines)


def dsjax_side(folder: Path) -> dict[str, float]:
    from rich.console import Console

    from dsjax.config import OptimConfig, PrecisionConfig
    from dsjax.config.posttraining import TuningConfig
    from dsjax.config.reinforcement import Reinforcement, RlConfig
    from dsjax.posttrain import reinforcement
    from dsjax.train import host_memory

    host_memory.keep_freed()  # as tools/grpo.py does
    config = Reinforcement(
        name="bench",
        init=str(folder),
        rl=RlConfig(
            problems=str(folder / "questions.jsonl"), rewards=("countdown",), prompts=QUESTIONS,
            group_size=GROUP, max_new_tokens=NEW, beta=BETA, replay=False,
        ),
        train=TuningConfig(
            steps=STEPS, batch_size=128, log_every=1, eval_every=0, checkpoint_every=0,
            remat="none", tensorboard=False,
        ),
        optim=OptimConfig(learning_rate=1e-6, schedule="constant", warmup_steps=0),
        precision=PrecisionConfig(compute="float32"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as run:
        reinforcement.learn(config, Path(run), command="", console=Console(quiet=True))
        text = (Path(run) / "metrics.jsonl").read_text()
    steps = [json.loads(line) for line in text.splitlines()][2:]  # the first ones compile
    keys = ("rollout_seconds", "old_seconds", "update_seconds")
    phases = [statistics.median(step[key] for step in steps) for key in keys]
    whole = statistics.median(sum(step[key] for key in (*keys, "grade_seconds")) for step in steps)
    return dict(zip(NAMES, (*phases, whole), strict=True))


def trl_side(folder: Path) -> dict[str, float]:
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from dsjax.posttrain.rewards.countdown import score

    torch.set_num_threads(1)
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=_end(), pad_token=_end()
    )

    def reward(completions: list[str], numbers: Any, target: Any, **_: Any) -> list[float]:
        facts = zip(completions, numbers, target, strict=True)
        return [score(text, {"numbers": n, "target": t}) for text, n, t in facts]

    trainer = GRPOTrainer(
        model=transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=QUESTIONS * GROUP,
            num_generations=GROUP, max_completion_length=NEW, beta=BETA, max_steps=STEPS,
            learning_rate=1e-6, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
            gradient_checkpointing=False, disable_tqdm=True, logging_steps=1000, temperature=1.0,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(lines * STEPS),
    )  # fmt: skip
    clocks: dict[str, list[float]] = {name: [] for name in ("rollout", "scored", "step")}

    def timed(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **options)
            clocks[name].append(time.perf_counter() - began)
            return result

        return run

    trainer._generate = timed("rollout", trainer._generate)
    trainer._generate_and_score_completions = timed(
        "scored", trainer._generate_and_score_completions
    )

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clocks["step"].append(time.perf_counter() - self.began)

    trainer.add_callback(Steps())
    trainer.train()
    rollout, scored, step = (
        statistics.median(clocks[name][2:]) for name in ("rollout", "scored", "step")
    )
    return dict(zip(NAMES, (rollout, scored - rollout, step - scored, step), strict=True))


def _end() -> str:
    from tests.text import released

    return released.EOS


def alone(side: str, folder: Path) -> dict[str, float]:
    """Runs a side in a process of its own, on one core with one thread."""
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, "-m", "tests.bench.bench_grpo", side, str(folder)]
    done = subprocess.run(
        command, env=os.environ | one | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    sides = {"dsjax": dsjax_side, "trl": trl_side}
    if len(sys.argv) == 3:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps(sides[sys.argv[1]](Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder)
        rounds = [
            {side: alone(side, folder) for side in sys.argv[1:] or sides} for _ in range(ROUNDS)
        ]
    found = {
        side: {name: statistics.median(r[side][name] for r in rounds) for name in NAMES}
        for side in rounds[0]
    }
    for side, times in found.items():
        print(f"{side:6}", "  ".join(f"{name} {times[name]:.3f} s" for name in NAMES))
    if len(found) == 2:
        ratios = (f"{name} {found['trl'][name] / found['dsjax'][name]:.1f}x" for name in NAMES)
        print("ratio ", "  ".join(ratios))


if __name__ == "__main__":
    main()

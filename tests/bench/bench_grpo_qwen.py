"""A GRPO step of a 1.5B Qwen2 shape on one accelerator: where its time goes.

The shape of DeepSeek-R1-Distill-Qwen-1.5B with random weights, bfloat16 over float32 masters: 32
questions, 8 answers each, of at most 1,024 tokens, one update, a KL against a reference. Random
weights hardly ever end an answer, so all rows stay full. The first two steps compile. No download
and no torch is needed.

    python -m tests.bench.bench_grpo_qwen            needs 80 GB
    python -m tests.bench.bench_grpo_qwen --small    a toy, to see that the script runs (CPU)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import jax
import ml_dtypes
from rich.console import Console

from configs.grpo_qwen_1_5b import config as RECIPE
from dsjax.config.reinforcement import Reinforcement
from dsjax.posttrain import reinforcement
from dsjax.posttrain.initial import open_initial
from tests.checkpoint import hf_files
from tests.golden.cases import QWEN2, Case
from tests.posttrain import toy
from tests.text import released

STEPS, WARM = 6, 2
LARGE = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SMALL = {"vocab_size": toy.VOCAB_SIZE, "max_position_embeddings": 1024}


def write_model(folder: Path, fields: dict[str, object]) -> None:
    """Writes random weights, a tokenizer of bytes and questions."""
    case = Case(QWEN2 | fields, seed=5)
    hf_files.write(folder, case.config, hf_files.plain(case, ml_dtypes.bfloat16))
    released.write_checkpoint(folder, toy.CONTROL["base"])
    lines = [
        {"prompt": f"Make 2{n % 10} of {n}, 6 and 9.", "numbers": [n, 6, 9], "target": 20 + n % 10}
        for n in range(32)
    ]
    toy.write_lines(folder / "questions.jsonl", lines)


def experiment(folder: Path, *, small: bool) -> Reinforcement:
    rl = dataclasses.replace(
        RECIPE.rl,
        problems=str(folder / "questions.jsonl"),
        prompts=8 if small else 32,
        group_size=4 if small else 8,
        minibatches=1,
        max_new_tokens=64 if small else 1024,
        sequence_length=1023 if small else 4095,
    )
    train = dataclasses.replace(
        RECIPE.train, steps=STEPS, eval_every=0, checkpoint_every=0, tensorboard=False
    )
    return dataclasses.replace(RECIPE, name="bench", init=str(folder), rl=rl, train=train)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_model(folder, SMALL if options.small else LARGE)
        config = experiment(folder, small=options.small)
        run = Path(place) / "run"
        code = reinforcement.learn(config, run, command="", console=Console(stderr=True))
        assert code == 0
        shape = open_initial(str(folder)).fill(config).shape
        lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines][WARM:STEPS]

    def middle(name: str) -> float:
        return statistics.median(step[name] for step in steps)

    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}: {shape.dim} wide, "
          f"{shape.n_layers} layers, {config.rl.prompts} x {config.rl.group_size} answers of "
          f"{middle('length'):.0f} tokens")  # fmt: skip
    names = ("rollout_seconds", "grade_seconds", "old_seconds", "update_seconds", "step_seconds")
    print("  ".join(f"{name.removesuffix('_seconds')} {middle(name):.2f} s" for name in names))
    print(f"rollout {middle('rollout_tokens_per_second'):,.0f} tokens/s, update "
          f"{middle('update_tokens_per_second'):,.0f} tokens/s, "
          f"{100 * middle('mfu'):.1f} % MFU of the whole step")  # fmt: skip


if __name__ == "__main__":
    main()

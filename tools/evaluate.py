"""Measures how many problems a checkpoint solves: pass@1, pass@k, maj@k and greedy, by rules.

CKPT is a Hugging Face folder, a folder imported by tools/convert.py, or the folder of a run.

  # mathematics as R1's authors measure it: 16 samples, temperature 0.6, top-p 0.95
  python tools/evaluate.py DeepSeek-R1-Distill-Qwen-1.5B --problems aime_2024.jsonl --n 16 \\
    --temperature 0.6 --top-p 0.95 --max-new-tokens 32768 --json aime.json
  # code, tests as HumanEval, MBPP or LiveCodeBench publish them
  python tools/evaluate.py runs/sft --problems HumanEval.jsonl.gz --n 20 --k 1 10 --reward code
  # the countdown game, with a base model that continues a text
  python tools/evaluate.py runs/zero --problems countdown.jsonl --reward countdown \\
    --template $'Question: {prompt}\\nAnswer:'

FILE is JSON lines or parquet: a prompt with what its reward reads (docs/rewards.md). A reward is
math, countdown, code, format, language, judge:..., model:..., prover:... or PATH.py:FUNCTION; the
default `rule` is the one that each problem names or implies. Sampling settings default to the
checkpoint's generation_config.json, else to temperature 1.
"""

from __future__ import annotations

import argparse
import sys

from dsjax import command


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_checkpoint(result)
    add = result.add_argument
    add("--problems", metavar="FILE", required=True, help="file or glob of problems")
    add("--reward", metavar="NAME", default="rule", help="what judges (default: %(default)s)")
    add("--n", metavar="N", type=int, default=8, help="samples per problem (default: %(default)s)")
    add("--k", metavar="K", type=int, nargs="+", help="for pass@K and maj@K (default: N)")
    add("--max-new-tokens", metavar="N", type=int, help="at most per sample (default: 2048)")
    add("--temperature", metavar="T", type=float, help="of the samples; one more is greedy")
    add("--top-p", metavar="P", type=float, help="keep the most likely that sum to P")
    add("--seed", metavar="S", type=int, default=0, help="of sampling (default: 0)")
    add("--max-batch", metavar="N", type=int, default=64, help="samples at a time (default: 64)")
    add("--system", metavar="TEXT", default="", help="instructions before each prompt")
    add("--template", metavar="TEXT", default="", help="text around each {prompt}")
    add("--raw", action="store_true", help="give prompts as plain text, without a chat format")
    add("--json", metavar="F", help="write figures and every sample here; - prints them instead")
    return result


def execute(arguments: argparse.Namespace) -> None:
    if arguments.n < 1 or any(k < 1 for k in arguments.k or ()):
        parser().error("--n and --k are at least 1")
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.parallel import compilation
    from dsjax.posttrain import evaluation

    compilation.use_persistent_cache("")
    evaluation.run(evaluation.Examination.of(arguments))


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

"""Fine-tunes a checkpoint on conversations, or resumes a stopped run.

CKPT is a Hugging Face folder, a folder imported by tools/convert.py, or the folder of a run.

  # the tiny pre-trained model on your own conversations, in runs/chat
  python tools/sft.py configs/sft_tiny.py --init runs/tiny --workdir runs/chat \\
      --set sft.files='chats/*.jsonl'
  # R1's recipe for a student: samples of a teacher, two epochs, cosine to a tenth
  python tools/sft.py configs/distill_qwen_1_5b.py --init Qwen2.5-Math-1.5B \\
      --set sft.files='samples/*.jsonl' sft.tokenizer=DeepSeek-R1-Distill-Qwen-1.5B
  # only the experts that a task uses
  python tools/sft.py configs/esft_v2_lite.py --init DeepSeek-V2-Lite --set sft.files=law.jsonl
  # resume a stopped run with the config that it keeps
  python tools/sft.py runs/chat --workdir runs/chat

A line of a file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}
or {"prompt": "...", "completion": "..."}; .jsonl, .jsonl.gz, .jsonl.zst and .parquet are read. Only
what the assistant says is trained, with the token that ends it. The result is a run like any other:
tools/score.py, generate.py, evaluate.py and convert.py export take its folder.

The same command, given again, resumes from the newest checkpoint. Ctrl-C or SIGTERM finishes the
step, saves and stops; a second one stops at once. Exit codes: 0 finished, 1 failed, 2 wrong usage,
130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import sys

from dsjax import command
from dsjax.config.finetuning import FineTuning


def execute(arguments: argparse.Namespace) -> int:
    config, folder = command.load_initial(arguments, FineTuning)
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.parallel import compilation, processes
    from dsjax.posttrain import finetuning
    from dsjax.train import host_memory

    host_memory.keep_freed()
    compilation.use_persistent_cache("")
    with processes.joined(arguments.coordinator, arguments.num_processes, arguments.process_id):
        return finetuning.train(config, folder, command=command.line())


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_config(result, default="configs/sft_tiny.py", kinds=(FineTuning,))
    command.add_initial(result)
    command.add_processes(result)
    return result


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

"""Trains a model that sees and draws, or resumes a stopped run.

CKPT is a folder of Janus, Janus-Pro, JanusFlow, DeepSeek-VL or VL2 as published, or `model/` of an
earlier run.

  # Janus-Pro's three stages: adaptors and head of codes; all but the tower; the tower too
  python tools/paint.py configs/janus_pro_1b_stage1.py --init Janus-Pro-1B --workdir runs/one \\
      --set janus.see=pairs/ janus.draw=pairs/
  python tools/paint.py configs/janus_pro_1b_stage2.py --init runs/one/model --workdir runs/two \\
      --set janus.see=pairs/ janus.text='text/*.jsonl' janus.draw='shards/*.tar'
  python tools/paint.py configs/janus_pro_1b_stage3.py --init runs/two/model --workdir runs/three \\
      --set janus.see=asked.jsonl janus.text='text/*.jsonl' janus.draw='shards/*.tar'
  # JanusFlow, whose latents a VAE makes: config.json and the weights of stabilityai/sdxl-vae
  python tools/paint.py configs/janusflow_1b_stage1.py --init JanusFlow-1.3B --workdir runs/flow \\
      --set janus.vae=sdxl-vae janus.see=pairs/ janus.draw=pairs/
  # models that see and do not draw learn from questions and answers, and from text
  python tools/paint.py configs/janus_pro_1b_stage3.py --init deepseek-vl2-tiny \\
      --workdir runs/asked --set janus.see=asked.jsonl janus.ratio=1,0,0 \\
      janus.trains=language,aligner train.batch_size=64 train.micro_batch_size=8
  # resume a stopped run with the config that it keeps
  python tools/paint.py runs/one --workdir runs/one

Pairs of a picture and a text are folders (cat.png beside cat.txt), JSON lines, parquet or
webdataset tars (docs/pictures.md). The result is DIR/model, a folder like the one that training
began with: tools/generate.py and tools/draw.py take it.

The same command, given again, resumes from the newest checkpoint. Ctrl-C or SIGTERM finishes the
step, saves and stops; a second one stops at once. Exit codes: 0 finished, 1 failed, 2 wrong usage,
130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import sys

from dsjax import command
from dsjax.config.janus import Janus


def execute(arguments: argparse.Namespace) -> int:
    config, folder = command.load_initial(arguments, Janus)
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.janus import training
    from dsjax.parallel import compilation, processes
    from dsjax.train import host_memory

    host_memory.keep_freed()
    compilation.use_persistent_cache(config.janus.cache_dir)
    with processes.joined(arguments.coordinator, arguments.num_processes, arguments.process_id):
        return training.train(config, folder, command=command.line())


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_config(result, default="configs/janus_pro_1b_stage1.py", kinds=(Janus,))
    command.add_initial(result)
    command.add_processes(result)
    return result


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))

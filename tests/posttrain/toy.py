"""Small checkpoints with a tokenizer: what post-training begins with in tests.

The tokenizer knows bytes (ids 3 to 258, as in DeepSeek's releases) and, from 259, the control
tokens of a release; 0 begins, 1 ends, 2 pads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.checkpoint import hf_files
from tests.golden.cases import DEEPSEEK_MOE, QWEN2, V2, V3, V3_MTP, Case
from tests.text import released

VOCAB_SIZE = 272
BASE = {name: i for name, i in released.IDS.items() if i < 3}
LATER = [name for name, i in released.IDS.items() if i > 2]
# The control tokens of each format, with ids that a small embedding has room for.
CONTROL = {
    "base": BASE,
    "V3": BASE | {released.USER: 263, released.ASSISTANT: 264},
    "R1": BASE | {"<think>": 261, "</think>": 262, released.USER: 263, released.ASSISTANT: 264},
    "V3.1": BASE | {name: 259 + place for place, name in enumerate(LATER)},
}
THINK, END_THINK, USER, ASSISTANT = 261, 262, 263, 264
SHAPES = {"V3": V3, "V3 MTP": V3_MTP, "V2": V2, "Qwen2": QWEN2, "MoE": DEEPSEEK_MOE}
# Narrower than the golden checkpoints, for whole training steps.
NARROW: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}


def write_hf(folder: Path, shape: str = "V3", control: str = "R1", **changes: Any) -> Path:
    """Writes a Hugging Face folder with random weights and the tokenizer of a release.

    Args:
      shape: a key of SHAPES.
      control: a key of CONTROL.
      changes: fields of config.json.
    """
    case = Case(SHAPES[shape] | NARROW | changes, seed=5)
    hf_files.write(folder, case.config, hf_files.plain(case))
    released.write_checkpoint(folder, CONTROL[control])
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

"""The tokens that DeepSeek-VL2's processor adds to its tokenizer: no file of a release holds them.

They get the next free ids, in this order, unless the tokenizer has them: padding (if its config
names none), the picture, the marks of places in a picture, the roles. `<|ref|>what<|/ref|>` names
something, `<|det|>[[x1, y1, x2, y2]]<|/det|>` says where it is, `<|grounding|>` asks for both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from dsjax.files import read_json
from dsjax.text.tokenizer import PAD

PROCESSOR_FILE = "processor_config.json"
IMAGE = "<image>"
REF, END_REF, DET, END_DET = "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"
MARKS = (REF, END_REF, DET, END_DET, "<|grounding|>")
ROLES = ("<|User|>", "<|Assistant|>")


def added_tokens(folder: Path, config: dict[str, Any]) -> list[AddedToken]:
    """Returns the tokens for the tokenizer of a folder; [] if it is not one of DeepSeek-VL2.

    Args:
      config: tokenizer_config.json.
    """
    path = folder / PROCESSOR_FILE
    if not path.is_file() or read_json(path).get("processor_class") != "DeepseekVLV2Processor":
        return []
    names = [] if config.get("pad_token") else [PAD]
    return [_token(name) for name in (*names, IMAGE, *MARKS, *ROLES)]


def show_marks(data: bytes) -> bytes:
    """Changes a tokenizer.json, of a processor that was saved, so that marks are part of a text.

    The library leaves special tokens out of a text, which would lose what a reply says of places.
    """
    if DET.encode() not in data:
        return data
    content = json.loads(data)
    for token in content.get("added_tokens", ()):
        if token.get("content") in MARKS:
            token["special"] = False
    return json.dumps(content).encode()


def _token(name: str) -> AddedToken:
    return AddedToken(name, normalized=False, special=name not in MARKS)

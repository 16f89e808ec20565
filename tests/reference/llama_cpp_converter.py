"""llama.cpp's own converter, without a tokenizer, as a program:

    python llama_cpp_converter.py LLAMA_CPP HF_FOLDER OUT_FOLDER F32 Q8_0 ...

LLAMA_CPP is its source, with the `gguf` package that belongs to it. Writes OUT_FOLDER/Q8_0.gguf.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def convert(source: Path, folder: Path, target: Path, kinds: list[str]) -> None:
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    import gguf
    from conversion import get_model_class  # pyright: ignore[reportMissingImports]

    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model_class = get_model_class(architecture)
    model_class.set_vocab = lambda self: self._set_vocab_none()
    for kind in kinds:
        file_type = gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
        model_class(folder, file_type, target / f"{kind}.gguf").write()


if __name__ == "__main__":
    convert(*map(Path, sys.argv[1:4]), sys.argv[4:])

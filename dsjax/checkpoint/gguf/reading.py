"""Presents a GGUF file as a Hugging Face folder, so that it can be loaded and imported as one.

Every published tensor is assembled from the file's when it is read, rows at a time; quantized
weights are dequantized to float32 by the package `gguf`. config.json, the tokenizer's files and the
chat template are made from the file's keys.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType

from dsjax.checkpoint import names
from dsjax.checkpoint.families import family_for
from dsjax.checkpoint.gguf import architecture, layout, vocabulary
from dsjax.checkpoint.gguf.container import Container, read_header
from dsjax.checkpoint.hf_config import to_hf
from dsjax.checkpoint.hf_folder import FLOAT32, HfFolder, Row
from dsjax.checkpoint.tensor_files import TensorFolder, TensorInfo
from dsjax.config import ModelConfig
from dsjax.files import listed, shown

_PLAIN = {
    GGMLQuantizationType.F32: FLOAT32,
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# Copies of the main embedding and head, which some files hold.
_COPIES = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")


class GgufTensors(TensorFolder):
    """The published tensors that a GGUF file holds."""

    def __init__(self, container: Container, model: ModelConfig, family: str, arch: str):
        self._container, self._model = container, model
        self._family, self._arch = family, arch
        self._rows = {row.name: row for row in names.tensors(model, family) if not row.is_copy}
        infos = {name: self._info(row) for name, row in self._rows.items()}
        super().__init__(container.path.parent, infos, {container.path: container.size})

    def _info(self, tensor: names.Tensor) -> TensorInfo:
        stored = self._container.tensors[layout.file_name(tensor, self._model, self._family)[0]]
        dtype = _PLAIN.get(stored.type, FLOAT32)
        n_bytes = math.prod(tensor.shape) * dtype.itemsize
        # Experts are read in the order of their bytes.
        offset = stored.offset + (tensor.slot[1] if len(tensor.slot) > 1 else 0)
        return TensorInfo(tensor.name, dtype, tensor.shape, self._container.path, offset, n_bytes)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a published tensor, or `rows` of its first dimension, into a new C-ordered array;
        thread-safe.

        Raises:
          ValueError: the length of the file has changed since it was opened.
        """
        tensor = self._rows[name]
        start, stop, _ = (rows or slice(None)).indices(tensor.shape[0])
        wanted = slice(start, max(start, stop))
        part = layout.published_rows(
            tensor, self._model, self._family, self._arch, self._stored_rows, wanted
        )
        return np.ascontiguousarray(part)

    def _stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        kind = self._container.tensors[name].type
        data = self._container.rows(name, start, stop)
        return data.view(_PLAIN[kind]) if kind in _PLAIN else gguf.dequantize(data, kind)


def open_gguf(path: Path) -> HfFolder:
    """Opens a GGUF file as if it were a Hugging Face folder.

    Raises:
      ValueError: the file is damaged, of an architecture that is not supported, or its keys and
        tensors disagree.
    """
    container = read_header(path)
    parts = container.keys.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        raise ValueError(
            f"{path} is one of {shown(str(parts))} parts of a file; join them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    found = frozenset(container.tensors)
    model, arch = architecture.read(container.keys, found, _divisors(container), str(path))
    if model.n_mtp and not any(".nextn.eh_proj." in name for name in found):
        # As files of the main model alone are: the keys still count the modules.
        model = architecture.without_mtp(model)
    family = family_for(model)
    _check(container, model, family, arch)
    tensors = GgufTensors(container, model, family, arch)
    rows = [
        Row(tensor, tensors.tensors[tensor.name].dtype, None)
        for tensor in names.tensors(model, family)
        if not tensor.is_copy
    ]
    texts = vocabulary.read(container.keys, str(path))
    dtype = next(row.dtype for row in rows)  # the embedding's
    config = to_hf(model, family, dtype=dtype.name)
    generation = json.loads(texts.get("generation_config.json", "{}"))
    config |= {key: value for key, value in generation.items() if key.endswith("_id")}
    texts["config.json"] = json.dumps(config, indent=2) + "\n"
    return HfFolder(path, config, family, model, None, tensors, rows, texts=texts)


def _divisors(container: Container) -> np.ndarray | None:
    stored = container.tensors.get(layout.ROPE_FREQS)
    if stored is None:
        return None
    if stored.type != GGMLQuantizationType.F32 or len(stored.shape) != 1:
        raise ValueError(f"{container.path}: {stored.name} is no vector of F32; it is damaged")
    return container.rows(stored.name, 0, 1).view(np.float32)[0]


def _check(container: Container, model: ModelConfig, family: str, arch: str) -> None:
    """Compares the file's tensors with those that its keys imply.

    Raises:
      ValueError: some are missing, unexpected, of another shape, or of a type that cannot be read.
    """
    problems, left = [], dict(container.tensors)
    for entry in layout.entries(model, family, arch):
        stored = left.pop(entry.name, None)
        if stored is None:
            problems.append(f"missing {entry.name} {list(entry.shape)}")
        elif stored.shape != entry.shape:
            wanted = f"{entry.name} is {list(stored.shape)}, the keys give {list(entry.shape)}"
            problems.append(wanted)
        elif not _is_readable(stored.type):
            problems.append(f"{entry.name} has type {stored.type.name}, which cannot be read")
    problems += [f"unexpected {shown(name)}" for name in left if not name.endswith(_COPIES)]
    if problems:
        raise ValueError(
            f"{container.path}: the tensors are not those that the keys describe for {arch}: "
            f"{listed(problems)}. The file is damaged or of another version of llama.cpp"
        )


def _is_readable(kind: GGMLQuantizationType) -> bool:
    if kind in _PLAIN:
        return True
    _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blank: Any = np.zeros((1, n_bytes), np.uint8)
    try:
        gguf.dequantize(blank, kind)
    except NotImplementedError:
        return False
    return True

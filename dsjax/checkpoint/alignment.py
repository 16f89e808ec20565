"""Reads and writes what JanusFlow's training projects hidden states with, a
`dsjax.vision.alignment.Alignment`.

It is no part of the model, so it has a file of its own beside the model's folder, with which the
next stage goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from dsjax.checkpoint.eyes import filled, published
from dsjax.checkpoint.families.sight import Part, linear
from dsjax.checkpoint.tensor_files import TensorFolder, plan_shards, read_header, write_shard
from dsjax.files import listed
from dsjax.vision.alignment import Alignment

FILE = "alignment.safetensors"
_FLOAT32 = np.dtype(np.float32)


def load_alignment(file: Path, declared: Alignment, mesh: Mesh) -> Alignment:
    """Reads a file, each device its own part.

    Args:
      declared: the network, without values.

    Raises:
      ValueError: the file is damaged, or it belongs to another model.
      OSError: it cannot be read.
    """
    found, size = read_header(file)
    wanted = {part.name: part.shape for part in _parts(declared)}
    there = {name: info.shape for name, info in found.items() if info.dtype == _FLOAT32}
    if there != wanted:
        wrong = [
            f"{name} {list(there[name])}" if name in there else f"no float32 {name}"
            for name in sorted(there.keys() | wanted.keys())
            if there.get(name) != wanted.get(name)
        ]
        raise ValueError(
            f"janus.alignment={file} does not fit the model that the run begins with: "
            f"{listed(wrong)}. Name {FILE} of the run that wrote that model, or leave it out"
        )
    files = TensorFolder(file.parent, found, {file: size})
    return filled(declared, list(_parts(declared)), files, _FLOAT32, mesh)


def write_alignment(folder: Path, alignment: Alignment) -> None:
    """Writes FILE into an existing folder.

    Args:
      alignment: the network, its values NumPy's.

    Raises:
      OSError: it cannot be written.
    """
    tensors = published(alignment, list(_parts(alignment)))
    (shard,) = plan_shards((name, _FLOAT32, tensor.shape) for name, tensor in tensors.items())
    write_shard(folder, shard._replace(file_name=FILE), lambda name: tensors[name])


def _parts(alignment: Alignment) -> Iterator[Part]:
    for number, layer in enumerate(alignment.layers):
        n_in, n_out = layer.weight.get_value().shape
        yield from linear(f"layers.{number}", ("layers", str(number)), n_out, n_in)

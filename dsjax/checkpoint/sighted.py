"""Reads and writes a language model and its eyes as one module, in the layouts of Hugging Face.

A published folder of Janus is what training begins with and what it ends with, so whatever works
with the one works with the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsjax.checkpoint import names
from dsjax.checkpoint.eyes import load_eyes, published
from dsjax.checkpoint.families.sight import Part
from dsjax.checkpoint.load import Checkpoint, load
from dsjax.checkpoint.tensor_files import plan_shards, write_index, write_shard
from dsjax.files import write_json
from dsjax.model.layers import RouterState
from dsjax.vision.eyes import Eyes
from dsjax.vision.sighted import Sighted


def load_masters(checkpoint: Checkpoint, mesh: Mesh) -> tuple[nnx.State, nnx.State]:
    """Reads the parameters of a `Sighted` as float32, each device its own part, and the router
    state.

    Raises:
      ValueError: files are damaged, the model does not see, or it does not fit the mesh.
    """
    language = load(checkpoint, mesh=mesh, dtype=np.float32)
    _, params, router = nnx.split(language, nnx.Param, RouterState)
    _, own, _ = nnx.split(load_eyes(checkpoint, mesh=mesh, dtype=np.float32), nnx.Param, ...)
    return nnx.merge_state(params, nnx.State({"eyes": own})), router


def write_sighted(
    folder: Path,
    model: Sighted,
    family: str,
    parts: list[Part],
    config: Mapping[str, Any],
    dtype: np.dtype,
    gather: Callable[[jax.Array], np.ndarray] = np.asarray,
    *,
    writes: bool = True,
) -> None:
    """Writes weights and config.json into an existing folder, config.json last.

    Args:
      parts: the tensors beside the language model.
      dtype: of the weights but for those that are always float32.
      gather: brings a whole array to this process.
      writes: whether this process writes; all of them must gather together.

    Raises:
      OSError: a file cannot be written.
    """
    model = jax.tree.map(gather, model)
    if not writes:
        return
    tensors = published(_eyes(model), parts)
    dtypes = dict.fromkeys(tensors, dtype)
    leaves = {
        tuple(map(str, path)): np.asarray(variable[...])
        for state in nnx.state(model, nnx.Param, RouterState)
        for path, variable in nnx.to_flat_state(state)
    }
    for row in names.tensors(model.config, family):
        tensor = leaves[row.path][row.slot]
        tensors[row.name] = tensor.T if row.transpose else tensor
        dtypes[row.name] = np.dtype(np.float32) if row.keep_float32 else dtype
    shards = plan_shards((name, dtypes[name], tensor.shape) for name, tensor in tensors.items())
    for shard in shards:
        write_shard(folder, shard, lambda name: np.ascontiguousarray(tensors[name], dtypes[name]))
    write_index(folder, shards)
    write_json(folder / "config.json", config)


def _eyes(model: Sighted) -> Eyes:
    return model.eyes

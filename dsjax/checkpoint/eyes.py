"""Loads what a checkpoint has beside its language model, and writes it.

`load` in load.py takes the language model out of the same folder, so that whatever works with a
language model works with these too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dsjax.checkpoint.families.sight import Part
from dsjax.checkpoint.load import Checkpoint
from dsjax.checkpoint.tensor_files import TensorFolder
from dsjax.model.layers import stays_float32
from dsjax.model.parameters import AnyModule, declarations, shardings
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes


def load_eyes(
    checkpoint: Checkpoint, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> Eyes:
    """Loads what a model sees and draws with.

    Args:
      mesh: the mesh to shard the weights over; None: the default device.
      dtype: of weights and activations; None: the checkpoint's.

    Raises:
      ValueError: the checkpoint has nothing of the kind, or it does not fit the mesh.
    """
    hf = checkpoint.hf
    if hf is None or hf.beside is None:
        raise ValueError(
            f"{checkpoint.path} is a language model alone, which does not see; name a checkpoint "
            "of Janus, JanusFlow, DeepSeek-VL or VL2, in the folder that it was published in"
        )
    wanted = np.dtype(checkpoint.dtype if dtype is None else dtype)
    return filled(Eyes(hf.beside.vision, Policy(wanted)), hf.beside.parts, hf.files, wanted, mesh)


def filled(
    module: AnyModule,
    parts: Sequence[Part],
    files: TensorFolder,
    dtype: np.dtype,
    mesh: Mesh | None,
) -> AnyModule:
    """Returns a declared module with the weights that the parts name.

    Args:
      dtype: of weights that have no type of their own.
    """
    slots: dict[str, dict[tuple[int, ...], Part]] = {}
    for part in parts:
        slots.setdefault(".".join(part.path), {})[part.slot] = part
    names = iter([each.path for each in declarations(module)])
    placement = module if mesh is None else shardings(module, mesh)

    def fill(variable: nnx.Variable, placed: nnx.Variable) -> nnx.Variable:
        shape = variable.get_value().shape
        own = np.dtype(np.float32) if stays_float32(variable) else dtype
        leaf = _assembled(slots.pop(next(names)), shape, own, files.read)
        if mesh is None:
            return variable.copy(jax.device_put(leaf))
        sharding = placed.get_value()
        return variable.copy(
            jax.make_array_from_callback(shape, sharding, lambda index: leaf[index])
        )

    whole = jax.tree.map(fill, module, placement, is_leaf=_is_variable)
    assert not slots, f"the module has no {sorted(slots)}"
    return whole


def _assembled(
    parts: Mapping[tuple[int, ...], Part], shape: tuple[int, ...], dtype: np.dtype, read: Any
) -> np.ndarray:
    """Reads the tensors of a leaf."""
    leaf = np.empty(shape, dtype)
    depth = len(next(iter(parts)))
    assert len(parts) == int(np.prod(shape[:depth])), "the name table leaves part of a leaf unread"
    for slot, part in parts.items():
        leaf[slot] = part.ours(read(part.name).astype(dtype), shape[depth:])
    return leaf


def published(module: nnx.Module, parts: list[Part]) -> dict[str, np.ndarray]:
    """Returns the tensors as published, in the dtype that each leaf has."""
    names = [each.path for each in declarations(module)]
    leaves = dict(zip(names, jax.tree.leaves(module), strict=True))
    return {
        part.name: part.published(np.asarray(leaves[".".join(part.path)])[part.slot])
        for part in parts
    }


def _is_variable(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)

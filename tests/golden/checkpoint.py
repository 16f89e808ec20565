"""Random checkpoints that need no storing: each tensor is drawn from a generator keyed by the seed
and its published name.

Numbers come from the raw 64-bit stream of Philox, which NumPy promises never to change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np

from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import family_of, from_hf
from dsjax.config import ModelConfig
from tests.golden.cases import Case

# Size of the input that a norm is tried on: small enough that its epsilon shows.
SMALL = 0.01


def uniform(seed: int, name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """Float32 in [low, high), the same on every machine for the same seed and name."""
    key = int.from_bytes(
        hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little"
    )
    raw = np.random.Philox(key=key).random_raw(math.prod(shape))
    fraction = (raw >> np.uint64(40)).astype(np.float64) / 2**24
    return (low + (high - low) * fraction).astype(np.float32).reshape(shape)


def normal_like(seed: int, name: str, shape: tuple[int, ...], std: float = 1.0) -> np.ndarray:
    """Float32 of mean 0 and this standard deviation, drawn uniformly."""
    return uniform(seed, name, shape, -std * math.sqrt(3), std * math.sqrt(3))


def weight(case: Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor as published; activations keep a size of about 1 through the network."""
    if name.endswith("e_score_correction_bias"):
        return uniform(case.seed, name, shape, *case.bias)
    if name.endswith(".bias"):
        return normal_like(case.seed, name, shape, 0.5)
    if len(shape) == 1:
        return uniform(case.seed, name, shape, 0.5, 1.5)
    if name.endswith("embed_tokens.weight"):
        return normal_like(case.seed, name, shape)
    return normal_like(case.seed, name, shape, shape[1] ** -0.5)


def published(case: Case) -> dict[str, np.ndarray]:
    """The checkpoint as Hugging Face stores it."""
    rows = list(names.tensors(from_hf(case.config), family_of(case.config)))
    source = {row.path: row.name for row in rows if not row.is_copy}
    return {
        row.name: weight(case, source[row.path] if row.is_copy else row.name, row.shape)
        for row in rows
    }


def parameters(case: Case) -> tuple[ModelConfig, dict[str, Any]]:
    """The same checkpoint as our parameter tree, float32."""
    config = from_hf(case.config)
    leaves: dict[tuple[str, ...], dict[tuple[int, ...], np.ndarray]] = {}
    for row in names.tensors(config, family_of(case.config)):
        if not row.is_copy:
            tensor = weight(case, row.name, row.shape)
            leaves.setdefault(row.path, {})[row.slot] = tensor.T if row.transpose else tensor
    tree: dict[str, Any] = {}
    for path, parts in leaves.items():
        node = tree
        for step in path[:-1]:
            node = node.setdefault(step, {})
        node[path[-1]] = _stacked(parts)
    return config, tree


def _stacked(parts: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    leading = tuple(size + 1 for size in max(parts))
    leaf = np.full(leading + next(iter(parts.values())).shape, np.nan, np.float32)
    for index, part in parts.items():
        leaf[index] = part
    assert not np.isnan(leaf).any(), "the name table leaves part of a stack unwritten"
    return leaf


def replaced(config: ModelConfig, **changes: Any) -> ModelConfig:
    return dataclasses.replace(config, **changes)


def tokens(case: Case, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids [length]."""
    return np.floor(
        uniform(case.seed, f"tokens {seed}", (length,), 0, case.config["vocab_size"])
    ).astype(np.int32)


def inputs(case: Case, length: int) -> np.ndarray:
    """A random hidden state [length, dim] for a module on its own."""
    return normal_like(case.seed, "inputs", (length, case.config["hidden_size"]))

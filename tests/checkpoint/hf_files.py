"""Small checkpoints as Hugging Face publishes them, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import family_of, from_hf, quantization_config
from dsjax.checkpoint.hf_folder import FP8, scale_name, scale_shape
from dsjax.checkpoint.tensor_files import plan_shards, write_index, write_shard
from dsjax.files import write_json
from tests.golden.cases import Case
from tests.golden.checkpoint import published

BLOCK = (16, 16)


def quantization(block: tuple[int, int] = BLOCK) -> dict[str, Any]:
    """The quantization_config of an FP8 checkpoint of small blocks."""
    return quantization_config(block)


def plain(case: Case, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint in one dtype, the router's bias in float32 all the same."""
    kept = {row.name for row in _rows(case) if row.keep_float32}
    return {
        name: value if name in kept else value.astype(dtype)
        for name, value in published(case).items()
    }


def in_fp8(case: Case, block: tuple[int, int] = BLOCK) -> dict[str, np.ndarray]:
    """The tensors as in the published FP8 layout: values of any size, scales to any factor."""
    tensors = plain(case, ml_dtypes.bfloat16)
    rng = np.random.default_rng(case.seed)
    for row in _rows(case):
        if row.quantized:
            tensors[row.name] = (100 * tensors[row.name].astype(np.float32)).astype(FP8)
            shape = scale_shape(row.shape, block)
            tensors[scale_name(row.name)] = rng.uniform(1e-3, 2e-2, shape).astype(np.float32)
    return tensors


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], max_bytes: int = 10**9
) -> Path:
    """Writes config.json and the tensors, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    shards = plan_shards(
        ((name, value.dtype, value.shape) for name, value in tensors.items()), max_bytes
    )
    for shard in shards:
        write_shard(folder, shard, tensors.__getitem__)
    write_index(folder, shards)
    return folder


def _rows(case: Case) -> list[names.Tensor]:
    return list(names.tensors(from_hf(case.config), family_of(case.config)))

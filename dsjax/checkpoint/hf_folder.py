"""A Hugging Face folder: config.json and tensors that agree, or a list of where they do not.

Opening reads config.json and the headers of the weight files, no weight. Each tensor that the
family's table names must be there, in its shape and a dtype that weights may have, and nothing else
may be. What config.json alone cannot say is decided by the tensors:

1. FP8. A weight is in FP8 if a `_scale_inv` lies beside it, whatever lists of modules say.
2. Multi-token prediction. transformers drops the module's tensors when it saves a V3 and leaves
   `num_nextn_predict_layers` as it was, so all of them missing means a model without the module.

No code of the folder is run: `auto_map` is not looked at.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import family_of, from_hf, weight_block
from dsjax.checkpoint.tensor_files import TensorFolder, TensorInfo, open_folder
from dsjax.config import ModelConfig
from dsjax.files import listed, read_json, shown

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT32 = np.dtype(np.float32)
# float16 is finer than bfloat16, so it is whole in float32 only: `load` reads it as that.
PLAIN = (FLOAT32, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
# Old Llama checkpoints carry a table that is computed from rope_theta.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")

_logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A tensor of the table and how this folder stores it."""

    tensor: names.Tensor
    dtype: np.dtype  # as stored
    scale: str | None  # the name of its scales, if it is in FP8


class Mismatches(NamedTuple):
    """Where tensors and config.json disagree, in words."""

    missing: list[str]
    wrong: list[str]  # of another shape or dtype, or without their scales
    unexpected: list[str]


@dataclasses.dataclass(frozen=True)
class HfFolder:
    """A checkpoint as Hugging Face stores it, checked."""

    path: Path
    config: dict[str, Any]  # config.json as published
    family: str
    model: ModelConfig
    block: tuple[int, int] | None  # rows and columns of a weight that share a scale
    files: TensorFolder
    rows: list[Row]  # in the order of the name table


def is_hf(path: Path) -> bool:
    """Whether a folder looks like Hugging Face's, whole or not: by its config or weight files."""
    if not path.is_dir():
        return False
    try:
        config = read_json(path / "config.json")
    except ValueError:
        config = {}
    return "model_type" in config or any(name.endswith(_WEIGHT_FILES) for name in os.listdir(path))


def open_hf(path: Path, overrides: Mapping[str, Any] | None = None) -> HfFolder:
    """Opens a folder of config.json and safetensors files.

    Args:
      overrides: fields of config.json, read as if the file said so.

    Raises:
      ValueError: config.json or the files cannot be read or honoured, or they disagree: tensors
        missing, unexpected, of another shape or dtype, or without their scales; all are listed.
    """
    config, family, model, block = read_config(path / "config.json", overrides)
    files = open_folder(path)
    model = without_absent_mtp(model, files.tensors)
    rows, mismatches = compare(model, family, block, files.tensors)
    problems = [*mismatches.missing, *mismatches.wrong, *mismatches.unexpected]
    if problems:
        raise ValueError(
            f"{path}: the tensors are not those that config.json describes for {family}: "
            f"{listed(problems)}. Download what is missing; if the files are whole, config.json is "
            "of another checkpoint"
        )
    return HfFolder(path, config, family, model, block, files, rows)


def compare(
    model: ModelConfig,
    family: str,
    block: tuple[int, int] | None,
    found: Mapping[str, TensorInfo],
) -> tuple[list[Row], Mismatches]:
    """Holds the tensors found against the family's table; the rows are right if all is well."""
    mismatches = Mismatches([], [], [])
    rows, used = [], set()
    for tensor in names.tensors(model, family):
        row = _match(tensor, found, block, mismatches)
        rows.append(row)
        used |= {tensor.name, row.scale}
    mismatches.unexpected.extend(
        f"unexpected {shown(name)} {_described(info)}"
        for name, info in found.items()
        if name not in used and not _IGNORED.fullmatch(name)
    )
    return rows, mismatches


def read_config(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str, ModelConfig, tuple[int, int] | None]:
    """Reads a config.json: as published, and the family, model and FP8 block that it describes.

    Args:
      overrides: fields, read as if the file said so.

    Raises:
      ValueError: it cannot be read, or asks for what this package does not have.
    """
    config = read_json(path) | dict(overrides or {})
    try:
        return config, family_of(config), from_hf(config), weight_block(config)
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}") from None


def without_absent_mtp(model: ModelConfig, found: Mapping[str, TensorInfo]) -> ModelConfig:
    """Returns the model, without multi-token prediction if none of its tensors is there."""
    if not model.n_mtp:
        return model
    prefixes = [f"model.layers.{model.n_layers + depth}." for depth in range(model.n_mtp)]
    if any(name.startswith(tuple(prefixes)) for name in found):
        return model
    _logger.info(
        "config.json announces %d multi-token prediction layers, the files hold none of their "
        "tensors: going on without",
        model.n_mtp,
    )
    return dataclasses.replace(model, n_mtp=0)


def scale_name(name: str) -> str:
    """The name of the scales of the FP8 weight `name`."""
    return f"{name}_scale_inv"


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a weight [out, in]; blocks at the edges may be ragged."""
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=True))


def _match(
    tensor: names.Tensor,
    found: Mapping[str, TensorInfo],
    block: tuple[int, int] | None,
    mismatches: Mismatches,
) -> Row:
    """Finds a tensor of the table, and its scales, among those found, or adds to `mismatches`."""
    name, problems = tensor.name, mismatches.wrong
    info, scale = found.get(name), found.get(scale_name(name))
    row = Row(tensor, info.dtype if info else FLOAT32, scale.name if scale else None)
    if info is None:
        mismatches.missing.append(f"missing {name} {list(tensor.shape)}")
        return row
    if info.shape != tensor.shape:
        problems.append(f"{name} is {_described(info)}, config.json gives {list(tensor.shape)}")
    elif info.dtype != FP8:
        if info.dtype not in PLAIN:
            problems.append(
                f"{name} has dtype {info.dtype}; weights may be float32, bfloat16 or float16, or "
                "float8_e4m3fn with scales"
            )
        elif scale:
            problems.append(f"{scale.name} is there, but {name} is {info.dtype} and not in FP8")
    elif len(tensor.shape) != 2:
        problems.append(f"{name} is in FP8, which only matrices may be")
    elif block is None:
        problems.append(f"{name} is in FP8, but config.json has no quantization_config")
    elif scale is None:
        mismatches.missing.append(f"missing {scale_name(name)}, the scales of an FP8 weight")
    else:
        wanted = scale_shape(tensor.shape, block)
        if (scale.dtype, scale.shape) != (FLOAT32, wanted):
            problems.append(
                f"{scale.name} is {_described(scale)}, blocks of {list(block)} give "
                f"float32{list(wanted)}"
            )
    return row


def _described(info: TensorInfo) -> str:
    return f"{info.dtype}{list(info.shape)}"

"""Opens a Hugging Face folder, and checks that config.json and the tensors agree.

Opening reads config.json and the headers of the weight files. Weights are read in one case only: to
compare a redundant output head with the embedding. Every tensor in the family's table must be
there, with its shape and a supported dtype, and there must be no others. The tensors decide what
config.json cannot say by itself: a weight is in FP8 if it has a `_scale_inv`, whatever lists of
modules say; `reconcile` handles the parts that config.json and the files may disagree about.

No code from the folder is run: `auto_map` is ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsjax.checkpoint import families, names
from dsjax.checkpoint.beside import Beside, beside
from dsjax.checkpoint.hf_config import family_of, from_hf, weight_block
from dsjax.checkpoint.tensor_files import TensorFolder, TensorInfo, open_folder
from dsjax.config import ModelConfig
from dsjax.files import disguise, listed, read_json, shown

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT32 = np.dtype(np.float32)
# float16 has more mantissa bits than bfloat16, so `load` reads it as float32.
PLAIN = (FLOAT32, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
# Tables computed from rope_theta, which old checkpoints contain.
_TABLES = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")

_logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A tensor of the family's table, and how this folder stores it."""

    tensor: names.Tensor
    dtype: np.dtype  # as stored
    scale: str | None  # name of its scales, if it is in FP8


class Mismatches(NamedTuple):
    """Messages about tensors that disagree with config.json."""

    missing: list[str]
    wrong: list[str]  # another shape or dtype
    unexpected: list[str]


@dataclasses.dataclass(frozen=True)
class HfFolder:
    """A checkpoint in Hugging Face's form, checked."""

    path: Path
    config: dict[str, Any]  # config.json, with overrides applied
    family: str
    model: ModelConfig
    block: tuple[int, int] | None  # rows and columns of a weight that share a scale
    files: TensorFolder
    rows: list[Row]  # in the order of the family's table
    beside: Beside | None = None  # what a larger model has besides
    # what belongs beside the weights, by name, if `path` is a file that holds all of it
    texts: dict[str, str] = dataclasses.field(default_factory=dict)


def is_hf(path: Path) -> bool:
    """Tells by config.json or weight files whether a folder is Hugging Face's, complete or not."""
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
      overrides: values of fields of config.json, used instead of those in the file; see
        `read_config`.

    Raises:
      ValueError: the folder is not a checkpoint; config.json or the files cannot be read or are not
        supported; or they disagree: tensors are missing, unexpected, without scales, or of another
        shape or dtype.
    """
    check_kind(path)
    config, family, model, block = read_config(path / "config.json", overrides)
    files = open_folder(path).renamed(families.find(family).canonical)
    model, left_out = reconcile(model, family, files)
    found = {name: info for name, info in files.tensors.items() if name not in left_out}
    also = beside(config, family, found)
    of_language = {name: info for name, info in found.items() if not also or name not in also.names}
    rows, mismatches = compare(model, family, block, of_language)
    if also:
        mismatches.missing.extend(also.missing)
        mismatches.wrong.extend(also.wrong)
    problems = [*mismatches.missing, *mismatches.wrong, *mismatches.unexpected]
    if problems:
        advice = "config.json and the files belong to different checkpoints or revisions"
        if mismatches.missing:
            advice = f"Download what is missing; if the files are complete, {advice}"
        if not model.tie_embed and names.head_name(family) not in found:
            advice += ". If the embedding is also the head: --override tie_word_embeddings=true"
        raise ValueError(
            f"{path}: the tensors are not those that config.json describes for {family}: "
            f"{listed(problems)}. {advice}"
        )
    return HfFolder(path, config, family, model, block, files, rows, also)


def check_kind(path: Path) -> None:
    """Recognizes paths that are often mistaken for the folder of a checkpoint.

    Raises:
      ValueError: `path` does not exist, or is a file, part of the Hub's cache, or a LoRA adapter;
        says which, and what to do.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; name the folder of a checkpoint")
    elif not path.is_dir():
        what = None
        if path.is_file():  # a pipe would wait for a writer
            with path.open("rb") as file:
                what = disguise(file.read(512))
        raise ValueError(f"{path} is {what or 'not a folder; name the folder of a checkpoint'}")
    elif (path / "snapshots").is_dir() and not (path / "config.json").exists():
        main, found = path / "refs" / "main", sorted(os.listdir(path / "snapshots"))
        revision = main.read_text().strip() if main.is_file() else [*found, "REVISION"][0]
        raise ValueError(
            f"{path} is the root of a model in the Hub's cache. Its files are in "
            f"{path / 'snapshots' / revision}: name that folder"
        )
    elif cached := sorted(path.glob("models--*")):
        raise ValueError(
            f"{path} is the Hub's cache; name the folder of one revision, such as "
            f"{cached[0] / 'snapshots' / 'REVISION'}"
        )
    elif any(path.glob("adapter_model*")) or (
        (path / "adapter_config.json").is_file() and not any(path.glob("*.safetensors"))
    ):
        raise ValueError(
            f"{path} holds a LoRA adapter{_base_of(path)}, not a model. Merge it into its base "
            "model (PEFT: merge_and_unload, then save_pretrained), and name the merged folder"
        )


def _base_of(path: Path) -> str:
    """Returns words for the base model of an adapter, if its config names one."""
    with contextlib.suppress(ValueError):
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        return f" for {shown(base)}" if isinstance(base, str) and base else ""
    return ""


def compare(
    model: ModelConfig, family: str, block: tuple[int, int] | None, found: Mapping[str, TensorInfo]
) -> tuple[list[Row], Mismatches]:
    """Compares the tensors found with the family's table.

    The copies in MTP layers may be missing.

    Returns:
      the rows of the table, valid if nothing mismatches, and the mismatches.
    """
    mismatches = Mismatches([], [], [])
    rows, used = [], set()
    for tensor in names.tensors(model, family):
        if tensor.is_copy and tensor.name not in found:
            continue
        row = _match(tensor, found, block, mismatches)
        rows.append(row)
        used |= {tensor.name, row.scale}
    mismatches.unexpected.extend(
        f"unexpected {shown(name)} {_described(info)}"
        for name, info in found.items()
        if name not in used
    )
    return rows, mismatches


def read_config(
    path: Path, overrides: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], str, ModelConfig, tuple[int, int] | None]:
    """Reads a config.json; returns its contents, the family, the model and the FP8 block.

    Args:
      overrides: values of fields, used instead of those in the file; None means that the field is
        absent. A dot leads into an object: `rope_scaling.factor`.

    Raises:
      ValueError: the file cannot be read, or describes a model that is not supported.
    """
    config = read_json(path)
    for key, value in (overrides or {}).items():
        *outer, last = [key] if key in config else key.split(".")
        place = config
        for name in outer:
            inner = place.get(name)
            place[name] = dict(inner) if isinstance(inner, dict) else {}
            place = place[name]
        place[last] = value
    try:
        return config, family_of(config), from_hf(config), weight_block(config)
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}") from None


def reconcile(model: ModelConfig, family: str, files: TensorFolder) -> tuple[ModelConfig, set[str]]:
    """Resolves disagreements between config.json and complete files, and logs what it does.

    1. MTP layers that config.json announces and the files lack, or that the files contain and
       config.json does not announce, are left out: the main model is complete without them.
    2. The output head of a tied model is redundant, and left out if it equals the embedding. If
       not, a model that sees has a head of its own.
    3. Tables that are computed from rope_theta are left out (without a message), and what a model
       that sees has besides and never reads.

    Returns:
      the model that the files contain, and the names of the tensors to leave out.

    Raises:
      ValueError: the model is tied, and its output head differs from the embedding.
    """
    found = files.tensors
    left_out = {name for name in found if _TABLES.search(name)}
    if (sight := families.find(family).sight) and sight.unread:
        left_out |= {name for name in found if name.startswith(sight.unread)}

    def of_layer(layer: int) -> set[str]:
        prefix = names.layer_prefix(family, layer)
        return {name for name in found if name.startswith(prefix)}

    # A module is known by its projection, which no layer of the main model has.
    announced = range(model.n_layers, model.n_layers + model.n_mtp)
    if announced and not any(of_layer(layer) for layer in announced):
        _logger.warning(
            f"{files.path}: config.json announces {model.n_mtp} multi-token prediction layers, and "
            "the files contain none of their tensors: they are left out"
        )
        model = dataclasses.replace(model, n_mtp=0)
    layer = announced.stop
    while f"{names.layer_prefix(family, layer)}eh_proj.weight" in found:
        left_out |= of_layer(layer)
        layer += 1
    if layer > announced.stop:
        _logger.warning(
            f"{files.path}: the files contain {layer - announced.stop} multi-token prediction "
            f"layers that config.json does not announce ({len(announced)}): they are left out"
        )
    head = names.head_name(family)
    if model.tie_embed and head in found:
        embedding = next(names.tensors(model, family)).name
        if embedding in found and not files.equal(head, embedding):
            if sight:  # their configs say tied by default, whatever they hold
                return dataclasses.replace(model, tie_embed=False), left_out
            raise ValueError(
                f"{files.path}: config.json has tie_word_embeddings true, and {head} differs from "
                f"{embedding}. If the model was trained with a head of its own: --override "
                "tie_word_embeddings=false"
            )
        _logger.warning(f"{files.path}: {head} repeats the embedding: read as tied")
        left_out.add(head)
    return model, left_out


def scale_name(name: str) -> str:
    """Returns the name of the scales of an FP8 weight."""
    return f"{name}_scale_inv"


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Returns the shape of the scales of a weight [out, in]; blocks at the edges may be partial."""
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=True))


def _match(
    tensor: names.Tensor,
    found: Mapping[str, TensorInfo],
    block: tuple[int, int] | None,
    mismatches: Mismatches,
) -> Row:
    """Looks up a tensor of the table and its scales; adds to `mismatches` what is wrong."""
    name, problems = tensor.name, mismatches.wrong
    info, scale = found.get(name), found.get(scale_name(name))
    row = Row(tensor, info.dtype if info else FLOAT32, scale.name if scale else None)
    if info is None:
        mismatches.missing.append(f"missing {name} {list(tensor.shape)}")
        return row
    if info.shape != tensor.shape:
        problems.append(f"{name} is {_described(info)}, config.json gives {list(tensor.shape)}")
    elif tensor.integer:
        if info.dtype.kind not in "iu":
            problems.append(f"{name} has dtype {info.dtype}; it must be of integers")
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

"""Opens a checkpoint of any kind, and loads its weights into a model on any mesh.

A checkpoint is a folder as Hugging Face publishes it, or its name on the Hub, a folder written by
`tools/convert.py import`, the folder of a run, or a GGUF file; `open_checkpoint` detects which.
After that all kinds are alike: leaves of the parameter tree, of which any slice can be read.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from dsjax import settings
from dsjax.checkpoint import families, hub, manifest, store
from dsjax.checkpoint.families import family_for
from dsjax.checkpoint.gguf import is_gguf, refuse_overrides, require_package
from dsjax.checkpoint.hf_folder import HfFolder, Row, check_kind, is_hf, open_hf
from dsjax.checkpoint.names import Tensor
from dsjax.checkpoint.slices import Dequantized, Index, Leaf, Tensors, bounds, read_slice
from dsjax.checkpoint.small_weights import FP8, SMALL, Stored, format_of, load_small
from dsjax.checkpoint.weights import Weights, is_chunk
from dsjax.config import ModelConfig
from dsjax.files import cache_folder, listed, read_json, write
from dsjax.kernels.target import Target
from dsjax.model.layers import RouterState, stays_float32
from dsjax.model.parameters import shardings
from dsjax.model.transformer import Transformer
from dsjax.parallel.sharding import LookUp, stored_spec
from dsjax.precision.policy import Policy

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_AVERAGES = ("optimizer", "ema")  # where `dsjax.train.optimizer` keeps averages of weights
# Up to this size, everything that the devices of a process need of a leaf is read at once, so that
# devices whose slices share a tensor do not each read it.
HOST_BYTES = 4 << 30

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, open for reading.

    Attributes:
      dtype: the dtype that weights are stored in and loaded as: float32 or bfloat16; FP8 counts as
        bfloat16.
      tokenizer_folder: the folder of tokenizer.json, generation_config.json and the chat template,
        as far as the checkpoint has them.
      kind: the module that the weights are of.
      hf: the Hugging Face folder that it is; None for others.
    """

    path: Path
    model: ModelConfig
    family: str
    dtype: np.dtype
    tokenizer_folder: Path
    weights: Weights | None  # the arrays as stored; None for a Hugging Face folder
    _tensors: Mapping[tuple[str, ...], Tensors] = dataclasses.field(repr=False)
    kind: type[Transformer] = Transformer
    hf: HfFolder | None = dataclasses.field(default=None, repr=False)

    def read(
        self, path: tuple[str, ...], index: Index, dtype: np.dtype | None = None
    ) -> np.ndarray:
        """Reads part of a parameter; FP8 is dequantized in float32 first.

        Args:
          path: path of the parameter, as in `names.Tensor.path`.
          index: a slice or an integer per dimension.
          dtype: to cast to; None: the checkpoint's.

        Raises:
          ValueError: files are missing or damaged.
        """
        return read_slice(self._tensors[path], index, dtype or self.dtype)

    def read_fp8(self, path: tuple[str, ...]) -> Stored | None:
        """Returns readers of an FP8 parameter's own values and scales; None if it is not all FP8.

        They take an index per dimension, as `read` does, the scales' counted in blocks.
        """
        tensors = self._tensors[path]
        if not isinstance(tensors, Dequantized):
            return None
        rows, columns = tensors.block
        return Stored(
            functools.partial(read_slice, tensors.values, dtype=FP8),
            functools.partial(read_slice, tensors.scales, dtype=FLOAT32),
            (columns, rows) if tensors.leaf.transpose else (rows, columns),
        )

    @property
    def has_fp8(self) -> bool:
        """Tells whether any parameter is stored in FP8."""
        return any(isinstance(tensors, Dequantized) for tensors in self._tensors.values())

    def read_published(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """Reads rows [start, stop) of a tensor as published, [rows, in] for a matrix, in float32.

        Raises:
          ValueError: files are missing or damaged.
        """
        tensors = self._tensors[tensor.path]
        stored = tensors.leaf
        if stored.slot_rank == len(tensor.slot) and stored.transpose == tensor.transpose:
            return tensors.rows(tensor.slot, start, stop).astype(FLOAT32, copy=False)
        rows, rest = slice(start, stop), [slice(None)] * (len(tensor.shape) - 1)
        inner = [*rest, rows] if tensor.transpose else [rows, *rest]
        part = read_slice(tensors, [*tensor.slot, *inner], FLOAT32)
        return np.ascontiguousarray(part.T) if tensor.transpose else part


def load(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    look_up: LookUp = stored_spec,
) -> Transformer:
    """Loads a model.

    Each process reads only the slices of its own devices. Weights are cast slice by slice; the
    router's bias and an indexer's norm and head weights are always float32.

    Args:
      path: a Hugging Face folder, a converted folder, the folder of a run, one checkpoint of a run,
        or a GGUF file.
      mesh: the mesh to shard the weights over, as `parallel.sharding` says; None: the default
        device.
      dtype: of weights and activations, bfloat16 or float32; None: the checkpoint's. "fp8", "int8"
        and "int4" are of the matrices alone (`checkpoint.small_weights`), for inference; all else
        is bfloat16, on a CPU float32.
      look_up: how the mesh splits a weight: as training does, or `sharding.generation_spec`.

    Raises:
      ValueError: the folder has no complete checkpoint, its config and its arrays disagree, the
        model does not fit the mesh, or `dtype` is another one.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    small = SMALL.get(dtype if isinstance(dtype, str) else np.dtype(dtype).name)
    if small:
        wanted = FLOAT32 if Target.here().kind == "cpu" else BFLOAT16
    else:
        wanted = checkpoint.dtype if dtype is None else _weight_dtype(dtype)
    model = checkpoint.kind(checkpoint.model, Policy(wanted))
    placement = model if mesh is None else shardings(model, mesh, look_up)
    has_fp8 = checkpoint.has_fp8

    def fill(keys: tuple[Any, ...], variable: nnx.Variable, placed: nnx.Variable) -> nnx.Variable:
        own_path, shape = _path(keys), variable.get_value().shape
        own_dtype = FLOAT32 if stays_float32(variable) else wanted

        def read(index: Index) -> np.ndarray:
            return checkpoint.read(own_path, index, own_dtype)

        sharding = None if mesh is None else placed.get_value()
        stored = checkpoint.read_fp8(own_path) if small == FP8 else None
        format_ = None
        # What an FP8 checkpoint keeps in more bits is meant to have them.
        if small and (stored or small != FP8 or not has_fp8):
            format_ = format_of(own_path[-1], variable, small, sharding, stored)
        if format_:
            read_32 = functools.partial(checkpoint.read, own_path, dtype=FLOAT32)
            try:
                return variable.copy(load_small(read_32, shape, *format_, sharding, stored))
            except ValueError as error:
                raise ValueError(f"{'.'.join(own_path)}: {error}") from error
        if mesh is None:
            return variable.copy(jax.device_put(read((slice(None),) * len(shape))))
        return variable.copy(_distribute(read, shape, own_dtype, placed.get_value()))

    return jax.tree_util.tree_map_with_path(fill, model, placement, is_leaf=_is_variable)


def open_checkpoint(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    kind: type[Transformer] = Transformer,
    together: bool = True,
) -> Checkpoint:
    """Opens a checkpoint of any kind, a GGUF file, or a repository of the Hugging Face Hub, which
    is downloaded.

    For a converted folder, the sizes of all files are checked now, and their bytes before they are
    read. For a run, all files are hashed now.

    Args:
      overrides: values of fields of a Hugging Face config.json, used instead of those in the file;
        see `hf_folder.read_config`.
      kind: the module that a run is of. Other folders hold a Transformer.
      together: whether all processes open it, each of which then hashes a share of a run's files.

    Raises:
      ValueError: there is no checkpoint, it is not as it was written, its config and its arrays
        disagree, or it is of another kind; or overrides are given for a folder of our own.
    """
    path = hub.located(path)
    begun = path.parent / f"{path.name}.partial"  # of `.`, which has no name, there is none
    if not path.exists() and begun.is_dir():
        raise ValueError(f"{path} does not exist. {begun} is an unfinished conversion to it")
    if is_gguf(path):
        return _open_gguf(path, overrides)
    check_kind(path)
    if overrides and not is_hf(path):
        raise ValueError(
            f"--override {', '.join(overrides)}: {path} has no config.json of Hugging Face; give "
            "the fields when its source is imported"
        )
    if (path / "weights").is_dir():
        return _open_converted(path)
    if (path / "checkpoints").is_dir():
        return _open_run(path, kind, together=together)
    if path.name.isdecimal() and path.absolute().parent.name == "checkpoints":
        return _open_run(path.absolute().parent.parent, kind, int(path.name))
    if is_hf(path):
        return _open_hf(path, overrides)
    raise ValueError(
        f"{path} contains no checkpoint: neither config.json with safetensors files, as from "
        "Hugging Face, nor weights/, as from tools/convert.py, nor checkpoints/, as in a run"
    )


def _open_gguf(path: Path, overrides: Mapping[str, Any] | None) -> Checkpoint:
    refuse_overrides(path, overrides)
    require_package()
    from dsjax.checkpoint.gguf.reading import open_gguf

    folder = open_gguf(path)
    # Readers of tokenizers want a folder; these files are made again whenever they are missing.
    content = "".join(f"{name}\0{text}\0" for name, text in sorted(folder.texts.items()))
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    beside = cache_folder("") / "gguf" / digest
    beside.mkdir(parents=True, exist_ok=True)
    for name, text in folder.texts.items():
        if not (beside / name).is_file():
            write(beside / name, text)
    return _from_hf(folder, beside)


def _open_hf(path: Path, overrides: Mapping[str, Any] | None) -> Checkpoint:
    return _from_hf(open_hf(path, overrides), path)


def _from_hf(folder: HfFolder, tokenizer_folder: Path) -> Checkpoint:
    rows: dict[tuple[str, ...], dict[tuple[int, ...], Row]] = defaultdict(dict)
    for row in folder.rows:
        if not row.tensor.is_copy:
            rows[row.tensor.path][row.tensor.slot] = row
    declared = jax.tree_util.tree_leaves_with_path(
        Transformer(folder.model, Policy()), is_leaf=_is_variable
    )
    kept = {_path(keys) for keys, variable in declared if stays_float32(variable)}
    return Checkpoint(
        path=folder.path,
        model=folder.model,
        family=folder.family,
        dtype=_loaded_dtype(row.dtype for row in folder.rows if row.tensor.path not in kept),
        tokenizer_folder=tokenizer_folder,
        weights=None,
        _tensors={name: _hf_tensors(folder, slots) for name, slots in rows.items()},
        hf=folder,
    )


def _hf_tensors(folder: HfFolder, rows: Mapping[tuple[int, ...], Row]) -> Tensors:
    """Returns the tensors of a leaf, in a Hugging Face folder; FP8 with scales is dequantized."""
    tensor, dtype, _ = next(iter(rows.values()))
    slots = tuple(last + 1 for last in max(rows))
    leaf = Leaf((*slots, *tensor.target_shape), dtype, len(tensor.slot), tensor.transpose)
    values = _Named(folder, {slot: row.tensor.name for slot, row in rows.items()}, leaf)
    scaled = {slot: row.scale for slot, row in rows.items() if row.scale is not None}
    if not scaled:
        return values
    assert folder.block
    down, across = folder.block[::-1] if leaf.transpose else folder.block
    *outer, height, width = leaf.shape
    shape = (*outer, -(-height // down), -(-width // across))
    scales = _Named(folder, scaled, leaf._replace(shape=shape, dtype=FLOAT32))
    dequantized = Dequantized(values, scales, folder.block)
    return dequantized if len(scaled) == len(rows) else _Mixed(values, dequantized, set(scaled))


class _Named:
    """Tensors of a Hugging Face folder, one per slot of a leaf, as they are stored."""

    def __init__(self, folder: HfFolder, names: Mapping[tuple[int, ...], str], leaf: Leaf):
        self._folder, self._names, self.leaf = folder, names, leaf

    def rows(self, slot: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        return self._folder.files.read(self._names[slot], slice(start, stop))


class _Mixed:
    """Tensors of a leaf of which some are FP8 with scales, and others are not."""

    def __init__(self, plain: Tensors, dequantized: Tensors, scaled: set[tuple[int, ...]]):
        self.leaf, self._plain, self._dequantized = dequantized.leaf, plain, dequantized
        self._scaled = scaled

    def rows(self, slot: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        source = self._dequantized if slot in self._scaled else self._plain
        return source.rows(slot, start, stop)


def _open_converted(path: Path) -> Checkpoint:
    guard = manifest.Guard(path, later=is_chunk)
    config = read_json(path / "config.json")
    try:
        place = f"{path / 'config.json'}: model"
        model = settings.from_dict(config["model"], place, ModelConfig)
        family = families.find(config["family"]).name
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path / 'config.json'} does not describe a converted checkpoint ({error!r}); convert "
            "it again"
        ) from error
    return _with_weights(path, Weights(path / "weights", guard), model, family, path / "hf")


def _open_run(
    workdir: Path, kind: type[Transformer], step: int | None = None, *, together: bool = True
) -> Checkpoint:
    """Opens the checkpoint of a step, or the newest intact one."""
    directory = workdir / "checkpoints"
    if step is not None:
        manifest.verify(directory / str(step))
    elif (step := store.newest_whole(directory, together=together, say=_logger.warning)) is None:
        there = sorted(entry.name for entry in directory.iterdir())
        raise ValueError(
            f"{directory} has no checkpoint; it contains {', '.join(there) or 'nothing'}. A run "
            "writes one every train.checkpoint_every steps and when it is stopped"
        )
    model = _model_of_run(workdir / "config.json")
    weights = Weights(directory / str(step) / "state")
    # A run that began with a published checkpoint keeps what was beside the weights there.
    beside = workdir / "hf" if (workdir / "hf").is_dir() else workdir
    _check_kind(workdir, weights, kind)
    return _with_weights(workdir, weights, model, family_for(model), beside, kind)


def _check_kind(workdir: Path, weights: Weights, kind: type[Transformer]) -> None:
    if any(leaf[:2] == ("params", "eyes") for leaf in weights.leaves):
        result = workdir / "model"
        raise ValueError(
            f"{workdir} is the run of a model that sees, and what it trains is {result}"
            + ("; name that" if result.is_dir() else ", once it has finished; resume it first")
        )
    scores = ("params", "reward", "weight") in weights.leaves
    if scores and kind is Transformer:
        raise ValueError(
            f"{workdir} is a reward model, which scores answers and predicts no tokens. Use it as "
            "a reward, or name the checkpoint that it began with (init in its config.json)"
        )
    if not scores and kind is not Transformer:
        raise ValueError(
            f"{workdir} is a language model, not a reward model; train one from it with "
            "tools/prefer.py --set preference.kind=bradley_terry"
        )


def _model_of_run(path: Path) -> ModelConfig:
    """Reads the model from a run's config.json, whatever kind of run wrote it."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a run's checkpoints need it: copy it too")
    values = read_json(path).get("model")
    if values is None:
        raise ValueError(f"{path} does not say what the model is; the run has not begun")
    return settings.from_dict(values, f"{path}: model", ModelConfig)


def _with_weights(
    path: Path,
    weights: Weights,
    model: ModelConfig,
    family: str,
    tokenizer_folder: Path,
    kind: type[Transformer] = Transformer,
) -> Checkpoint:
    """Checks arrays stored as leaves against the model's declarations. Where a run's checkpoint
    holds an average of a weight, the model has that.
    """
    tensors, problems, cast = {}, [], set[np.dtype]()
    declared = jax.tree_util.tree_leaves_with_path(kind(model, Policy()), is_leaf=_is_variable)
    for keys, variable in declared:
        name = ("router" if isinstance(variable, RouterState) else "params", *_path(keys))
        average = (*_AVERAGES, *_path(keys))
        name = average if average in weights.leaves else name
        shape = variable.get_value().shape
        if name not in weights.leaves:
            problems.append(f"missing {'.'.join(name)} {list(shape)}")
        elif weights.leaves[name].shape != shape:
            found = list(weights.leaves[name].shape)
            problems.append(f"{'.'.join(name)} is {found}, the config gives {list(shape)}")
        else:
            tensors[_path(keys)] = weights.tensors(name)
            if not stays_float32(variable):
                cast.add(weights.leaves[name].dtype)
    left = {name[1:] for name in weights.leaves if name[0] in ("params", "router")}
    left -= {_path(keys) for keys, _ in declared}
    problems += [f"unexpected {'.'.join(name)}" for name in sorted(left)]
    if problems:
        raise ValueError(
            f"{weights.folder}: the arrays are not those that {path / 'config.json'} describes: "
            f"{listed(problems)}. The two belong to different checkpoints: copy or convert again"
        )
    dtype = _loaded_dtype(cast)
    return Checkpoint(path, model, family, dtype, tokenizer_folder, weights, tensors, kind)


def _loaded_dtype(stored: Iterable[np.dtype]) -> np.dtype:
    """Returns the narrowest dtype that represents all stored weights; FP8 counts as bfloat16."""
    return BFLOAT16 if set(stored) <= {BFLOAT16, FP8} else FLOAT32


def _weight_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted is None or wanted not in (FLOAT32, BFLOAT16):
        raise ValueError(
            f"dtype={dtype!r} is not supported; a model runs in bfloat16 or float32, and its "
            "weights may be fp8, int8 or int4"
        )
    return wanted


def _distribute(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding
) -> jax.Array:
    """Creates a sharded array; `read` is called for the slices of this process's devices."""
    boxes = {
        device: tuple(bounds(index or (), shape))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    # The smallest box around all slices; read at once if that reads no more than slice by slice.
    sides = list(zip(*boxes.values(), strict=True))
    hull = [(min(low for low, _ in side), max(high for _, high in side)) for side in sides]
    together = _size(hull) <= sum(map(_size, set(boxes.values())))
    if together and _size(hull) * dtype.itemsize <= HOST_BYTES:
        whole = read([slice(*side) for side in hull])
        lows = [low for low, _ in hull]

        def part(box: tuple[tuple[int, int], ...]) -> np.ndarray:
            inside = zip(box, lows, strict=True)
            return whole[tuple(slice(start - low, stop - low) for (start, stop), low in inside)]
    else:

        def part(box: tuple[tuple[int, int], ...]) -> np.ndarray:
            return read([slice(*side) for side in box])

    arrays, last, own = [], None, None
    for device, box in sorted(boxes.items(), key=lambda item: item[1]):
        if box != last:  # replicas are adjacent in this order
            last, own = box, part(box)
        arrays.append(jax.device_put(own, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _size(box: Iterable[tuple[int, int]]) -> int:
    return math.prod(stop - start for start, stop in box)


def _is_variable(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)


def _path(keys: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "name", getattr(key, "key", key))) for key in keys)

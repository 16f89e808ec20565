"""Converts a checkpoint of ours to a Hugging Face folder, as if DeepSeek had published it.

The source is a converted folder or the folder of a run. Tensors are written under their published
names in layer order, in shards of at most 5 GB; MTP layers include their copies of embedding and
head. Threads read and convert ahead of the writer. An interrupted export continues after its last
complete shard.

config.json is the published one, if there is one, with the dtype, FP8 blocks and number of MTP
layers that are written now. Its `auto_map` is removed, because the code that it names is not
copied.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsjax import __version__
from dsjax.checkpoint import families, hub, names
from dsjax.checkpoint.gguf import ENDING, require_package
from dsjax.checkpoint.hf_config import quantization_config, to_hf
from dsjax.checkpoint.hf_folder import FLOAT32, FP8, scale_name, scale_shape
from dsjax.checkpoint.importing import copy_side_files, side_files
from dsjax.checkpoint.load import Checkpoint, open_checkpoint
from dsjax.checkpoint.model_card import model_card
from dsjax.checkpoint.recode import BLOCK, Stored, check_choice, is_finite, recode, stored_dtype
from dsjax.checkpoint.relayout import relayout
from dsjax.checkpoint.staging import Converted, Staging, check_space, check_target, fingerprint
from dsjax.checkpoint.streaming import stream
from dsjax.checkpoint.tensor_files import Shard, plan_shards, write_index, write_shard
from dsjax.checkpoint.weights import Weights, leaf_name, scales_name
from dsjax.display import Transfer
from dsjax.files import read_json, write, write_json, writing
from dsjax.precision.fp8 import Scale
from dsjax.text.tokenizer import load_tokenizer


class Part(NamedTuple):
    """A tensor to write: a weight, or the scales of one."""

    tensor: names.Tensor
    stored: np.dtype  # of the weight, in the source
    wanted: np.dtype  # of the weight, in the export
    is_scales: bool

    def shape(self, block: tuple[int, int]) -> tuple[int, ...]:
        return scale_shape(self.tensor.shape, block) if self.is_scales else self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return FLOAT32 if self.is_scales else self.wanted

    @property
    def bytes_held(self) -> int:
        """Memory used while the part is converted."""
        return math.prod(self.tensor.shape) * (self.stored.itemsize + self.wanted.itemsize)


def export(
    source: Path,
    target: Path,
    *,
    dtype: str,
    choice: str | None,
    progress: Transfer,
    push: str | None = None,
) -> Converted:
    """Exports a checkpoint to a GGUF file, if that is what `target` is named, or to a Hugging Face
    folder.

    Args:
      dtype: of a folder, one of `recode.CHOICES`.
      choice: of a GGUF file, its types; see `gguf.types.parse`.
      push: a repository of the Hub to upload the result to.

    Raises:
      ValueError, OSError: as the two exports and `hub.push` do, or the choice is for the other one.
    """
    if push is not None:
        hub.check_push(push)
    done = _exported(source, target, dtype, choice, progress)
    if push is not None:
        progress.say(f"{target} is whole; pushing it to {push}")
        progress.say(f"pushed: {hub.push(target, push)}")
    return done


def _exported(
    source: Path, target: Path, dtype: str, choice: str | None, progress: Transfer
) -> Converted:
    if target.suffix != ENDING:
        if choice is not None:
            raise ValueError(
                f"--type {choice} is for GGUF files, and {target} is not named so; name it "
                f"{target.name}{ENDING}, or choose --dtype for a folder"
            )
        return export_checkpoint(source, target, dtype=dtype, progress=progress)
    if dtype != "keep":
        raise ValueError(f"--dtype {dtype} is for folders; for {target} choose --type")
    require_package()
    from dsjax.checkpoint.gguf.exporting import export_gguf

    return export_gguf(source, target, choice=choice, progress=progress)


def export_checkpoint(source: Path, target: Path, *, dtype: str, progress: Transfer) -> Converted:
    """Creates the Hugging Face folder `target` from a converted folder or the newest checkpoint of
    a run; from the published folder of a model that sees, the folder in the other layout.

    Args:
      dtype: one of `recode.CHOICES`.

    Raises:
      ValueError: the source is not a complete checkpoint of ours, contains NaN or infinity, or has
        a shape without a published form; the target exists or its disk is too full.
      OSError: a file cannot be read or written.
    """
    started = time.monotonic()
    check_choice(dtype)
    source, target = hub.located(source).resolve(), target.resolve()
    check_target(target, source)
    checkpoint = open_checkpoint(source)
    weights = checkpoint.weights
    if checkpoint.hf and checkpoint.hf.beside:
        if dtype != "keep":
            raise ValueError(f"--dtype {dtype}: the other layout of {source} keeps its dtype")
        return relayout(checkpoint, target, progress)
    if weights is None:
        kind = "GGUF file" if source.is_file() else "Hugging Face folder already"
        raise ValueError(f"{source} is a {kind}; import it, then export the result")
    parts = _plan(checkpoint, weights, dtype)
    block, scale = weights.block or BLOCK, families.find(checkpoint.family).scale
    config = _config(checkpoint, parts, block)
    shards = plan_shards((name, part.dtype, part.shape(block)) for name, part in parts.items())
    total = sum(map(_n_bytes, shards))
    check_space(target, total)
    files = [path for path in weights.folder.rglob("*") if path.is_file()]
    identity = {
        "dsjax": __version__,
        "the source": str(weights.folder),
        "the state of its files": fingerprint(files),
        "--dtype": dtype,
    }
    with Staging(target, identity, progress.say) as work, writing(work.content):
        left = [shard for shard in shards if shard.file_name not in work.finished]
        to_do = sum(map(_n_bytes, left))
        progress.begin("exporting", total, total - to_do)
        arrays = stream(
            lambda part: _read(weights, part, block, scale),
            (parts[tensor.name] for shard in left for tensor in shard.tensors),
            lambda part: part.bytes_held,
        )
        with contextlib.closing(arrays):
            _write_shards(work, left, arrays, progress)
        write_index(work.content, shards)
        _write_small_files(work.content, checkpoint, config, progress)
        named = next(iter(parts.values())).dtype.name if dtype == "keep" else dtype
        card = work.content / "README.md"
        if not card.exists():
            write(card, model_card(checkpoint, target.name, named))
        work.publish()
    return Converted(sum(len(shard.tensors) for shard in left), to_do, time.monotonic() - started)


def _n_bytes(shard: Shard) -> int:
    return sum(tensor.n_bytes for tensor in shard.tensors)


def _plan(checkpoint: Checkpoint, weights: Weights, choice: str) -> dict[str, Part]:
    """Returns every tensor of the export by its published name, in layer order."""
    parts = {}
    for tensor in names.tensors(checkpoint.model, checkpoint.family):
        stored = weights.leaves[leaf_name(tensor)].dtype
        wanted = stored_dtype(choice, tensor, stored)
        parts[tensor.name] = Part(tensor, stored, wanted, False)
        if wanted == FP8:
            parts[scale_name(tensor.name)] = Part(tensor, stored, wanted, True)
    return parts


def _read(weights: Weights, part: Part, block: tuple[int, int], scale: Scale) -> np.ndarray:
    """Converts a part, in published orientation.

    Raises:
      ValueError: it contains NaN or infinity.
    """
    name, slot, turned = leaf_name(part.tensor), part.tensor.slot, part.tensor.transpose
    if part.is_scales and part.stored == FP8:
        array = weights.read_published(scales_name(name), slot, turned)
    else:
        stored = Stored(weights.read_published(name, slot, turned))
        if part.stored == FP8 != part.wanted:
            stored = Stored(stored.values, weights.read_published(scales_name(name), slot, turned))
        made = recode(stored, part.wanted, block, scale)
        array = made.scales if part.is_scales else made.values
    assert array is not None
    if not is_finite(array):
        raise ValueError(
            f"{weights.folder}: {'.'.join(name)} contains NaN or infinity in the part for "
            f"{part.tensor.name}; export an earlier checkpoint, or import the source again"
        )
    return array


def _write_shards(
    work: Staging, shards: Sequence[Shard], arrays: Iterator[np.ndarray], progress: Transfer
) -> None:
    """Writes shards; `arrays` yields their tensors in order."""

    def produce(name: str) -> np.ndarray:
        array = next(arrays)
        progress.advance(array.nbytes)
        return array

    for shard in shards:
        write_shard(work.content, shard, produce)
        work.finish(shard.file_name)
    progress.stop()


def _config(
    checkpoint: Checkpoint, parts: Mapping[str, Part], block: tuple[int, int]
) -> dict[str, Any]:
    """Returns the config.json of the export.

    Raises:
      ValueError: the model has no published form.
    """
    dtype = next(iter(parts.values())).dtype.name  # the embedding
    in_fp8 = {part.stored for part in parts.values() if part.wanted == FP8}
    published = checkpoint.path / "hf" / "config.json"
    if not published.is_file():
        family, fp8_block = checkpoint.family, block if in_fp8 else None
        return to_hf(checkpoint.model, family, dtype=dtype, block=fp8_block)
    config = read_json(published)
    config.pop("auto_map", None)
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    if not in_fp8:
        config.pop("quantization_config", None)
    elif FP8 not in in_fp8 or not config.get("quantization_config"):
        # Otherwise blocks are as published, and so is their description.
        scale = families.find(checkpoint.family).scale
        config["quantization_config"] = quantization_config(block, scale)
    mtp = "num_mtp_layers" if "num_mtp_layers" in config else "num_nextn_predict_layers"
    if mtp in config:
        config[mtp] = checkpoint.model.n_mtp
    return config


def _write_small_files(
    folder: Path, checkpoint: Checkpoint, config: dict[str, Any], progress: Transfer
) -> None:
    """Writes tokenizer and configs; config.json last, for a folder without it cannot be loaded."""
    published = checkpoint.path / "hf"
    if published.is_dir():
        copy_side_files(
            [file for file in side_files(published) if file.name != "config.json"], folder
        )
    elif (checkpoint.tokenizer_folder / "tokenizer.json").is_file():
        config |= _write_tokenizer(checkpoint, folder)
    else:
        progress.say(f"{checkpoint.tokenizer_folder} has no tokenizer.json; neither has the export")
    write_json(folder / "config.json", config)


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> dict[str, int]:
    """Writes a run's tokenizer in transformers' form; returns the ids of its special tokens."""
    original = checkpoint.tokenizer_folder / "tokenizer.json"
    tokenizer = load_tokenizer(str(original))
    special = tokenizer.special
    ids = {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad}
    shutil.copyfile(original, folder / "tokenizer.json")
    tokens = {key.removesuffix("_id"): tokenizer.inner.id_to_token(i) for key, i in ids.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.model.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings | tokens)
    write_json(folder / "generation_config.json", ids)
    return ids

"""Writes a checkpoint of any kind as a GGUF file, for llama.cpp and ollama.

Weights are read, converted, quantized and written a few rows at a time, some of them in threads, so
memory is bounded whatever the size of the model: a layer's experts, one tensor in the file, are
never in memory together. The file appears under its name when it is whole; until then NAME.partial
holds the work, and the same command continues after the last complete tensor.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from dsjax import __version__
from dsjax.checkpoint import hub
from dsjax.checkpoint.gguf import architecture, layout, modelfile, quantizer, types, vocabulary
from dsjax.checkpoint.gguf.architecture import Field
from dsjax.checkpoint.gguf.container import ALIGNMENT
from dsjax.checkpoint.gguf.layout import Entry
from dsjax.checkpoint.hf_folder import FLOAT32
from dsjax.checkpoint.load import Checkpoint, open_checkpoint
from dsjax.checkpoint.recode import is_finite
from dsjax.checkpoint.staging import Converted, Staging, check_space, fingerprint
from dsjax.checkpoint.streaming import stream
from dsjax.config import ModelConfig
from dsjax.display import Transfer
from dsjax.files import publish, writing

# Values that are converted together, and what their conversion holds: the rows as read and as
# float32, and four arrays that quantizing makes of them.
_PIECE = 2 << 20
_BYTES_PER_VALUE = 4 * 6
_BYTES_HELD = 256 << 20
_LARGEST_HALF = float(np.finfo(np.float16).max)
_BESIDE = (".json", ".jinja", ".model")
_WIDE = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)

_KINDS = {
    "u32": (GGUFValueType.UINT32, None),
    "f32": (GGUFValueType.FLOAT32, None),
    "bool": (GGUFValueType.BOOL, None),
    "str": (GGUFValueType.STRING, None),
    "strs": (GGUFValueType.ARRAY, GGUFValueType.STRING),
    "i32s": (GGUFValueType.ARRAY, GGUFValueType.INT32),
}


class Piece(NamedTuple):
    """Rows of a published tensor that become rows of a tensor of the file."""

    entry: Entry
    source: int  # of the entry's sources
    start: int  # rows as published
    stop: int

    @property
    def n_values(self) -> int:
        source = self.entry.sources[self.source]
        return (self.stop - self.start) * math.prod(source.shape[1:])


class Plan(NamedTuple):
    """A file to write."""

    model: ModelConfig
    entries: list[Entry]
    types: dict[str, GGMLQuantizationType]
    fields: dict[str, Field]

    def n_bytes(self, entry: Entry) -> int:
        return types.n_bytes(entry.shape, self.types[entry.name])

    def writable(self, wide: GGMLQuantizationType) -> Plan:
        """Returns the plan with what only llama.cpp quantizes in the type `wide`."""
        kinds = self.types.items()
        return self._replace(types={n: k if k.name in types.OWN else wide for n, k in kinds})


def export_gguf(
    source: Path, target: Path, *, choice: str | None = None, progress: Transfer
) -> Converted:
    """Creates the GGUF file `target`, and a Modelfile for ollama beside it.

    Args:
      source: a Hugging Face folder, a converted folder, or a run.
      choice: the types, as `types.parse` reads them; None: F32 for float32 weights, else BF16.

    Raises:
      ValueError: the source is not a complete checkpoint, or contains NaN, infinity, or values too
        large for a type; llama.cpp computes another model; its tokenizer cannot be written; the
        target exists or its disk is too full.
      OSError: a file cannot be read or written.
    """
    started = time.monotonic()
    source, target = hub.located(source).resolve(), target.resolve()
    _check_target(target, source)
    if choice is not None:
        types.parse(choice)  # before the checkpoint is opened, which may take minutes
    checkpoint = open_checkpoint(source)
    plan, remarks, stops = _plan(checkpoint, choice)
    finishing = quantizer.find(plan.types)
    for remark in remarks:
        progress.say(remark)
    written = plan.writable(_default(checkpoint))
    total = sum(map(written.n_bytes, written.entries))
    finished = sum(map(plan.n_bytes, plan.entries)) if finishing else 0
    check_space(target, total + finished, "a smaller --type")
    identity = {
        "dsjax": __version__,
        "the source": str(source),
        "the state of its files": fingerprint(_files(checkpoint)),
        "--type": choice,
    }
    with Staging(target, identity, progress.say) as work, writing(work.content):
        file = work.content / target.name
        to_do = _write(file, written, checkpoint, work, progress)
        if finishing:
            file = quantizer.run(finishing, file, plan.types, progress)
        _publish(file, target)
        work.discard()
    if "tokenizer.ggml.tokens" in plan.fields:
        folder, context = checkpoint.tokenizer_folder, plan.model.max_seq_len
        modelfile.write_beside(target, folder, context, stops, progress.say)
    return Converted(len(plan.entries), to_do, time.monotonic() - started)


def _check_target(target: Path, source: Path) -> None:
    if source in target.parents and not (source / "checkpoints").is_dir():
        raise ValueError(
            f"{target} is inside {source}, the checkpoint to export; name a file elsewhere"
        )
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or name another file")


def _files(checkpoint: Checkpoint) -> list[Path]:
    """Lists the files that an export depends on."""
    if checkpoint.path.is_file():
        return [checkpoint.path]
    weights = checkpoint.weights.folder if checkpoint.weights else checkpoint.path
    beside = (path for path in checkpoint.tokenizer_folder.glob("*") if path.suffix in _BESIDE)
    return sorted({path for path in weights.rglob("*") if path.is_file()} | set(beside))


def _plan(checkpoint: Checkpoint, choice: str | None) -> tuple[Plan, list[str], list[str]]:
    """Plans the file; returns what to tell the user too, and the tokens that end a reply."""
    model, remarks = checkpoint.model, []
    if checkpoint.hf and checkpoint.hf.beside:
        remarks.append("only the language model is written: it answers without its pictures")
    problem = architecture.mtp_problem(model)
    if problem:
        remarks.append(
            f"the {model.n_mtp} multi-token prediction modules are left out, for llama.cpp could "
            f"not use them: {problem}"
        )
        model = architecture.without_mtp(model)
    architecture.check(model, str(checkpoint.path))
    arch = architecture.arch_of(model)
    entries = list(layout.entries(model, checkpoint.family, arch))
    choice = choice or _default(checkpoint).name
    rules = types.parse(choice)
    kinds = types.choose(rules, entries, choice)
    tokenizer = vocabulary.write(checkpoint.tokenizer_folder, model.vocab_size)
    fields = {
        "general.type": Field("str", "model"),
        "general.name": Field("str", checkpoint.path.name or "model"),
        "general.size_label": Field("str", _size_label(model, entries)),
        "general.quantization_version": Field("u32", gguf.GGML_QUANT_VERSION),
        "general.file_type": Field("u32", types.file_type(rules)),
        "general.alignment": Field("u32", ALIGNMENT),
        **{f"{arch}.{key}": field for key, field in architecture.write(model).items()},
        **tokenizer.fields,
    }
    return Plan(model, entries, kinds, fields), remarks + tokenizer.remarks, tokenizer.stops


def _default(checkpoint: Checkpoint) -> GGMLQuantizationType:
    """Returns the type that holds a checkpoint's weights as they are."""
    return _WIDE[0] if checkpoint.dtype == FLOAT32 else _WIDE[1]


def _size_label(model: ModelConfig, entries: Sequence[Entry]) -> str:
    """Returns a size as llama.cpp's converter writes it: 671B, or 256x21B for a mixture."""
    sizes = {entry.name: math.prod(entry.shape) for entry in entries}
    experts = sum(sizes[entry.name] for entry in entries if entry.group == "experts")
    total = sum(sizes.values())
    count = model.n_routed_experts
    return gguf.size_label(total, total - experts, experts // max(count, 1), count)


def _write(
    file: Path, plan: Plan, checkpoint: Checkpoint, work: Staging, progress: Transfer
) -> int:
    """Writes what is not yet written of a file; returns the bytes of its tensors written now."""
    if "header" not in work.finished:
        _write_header(file, plan)
        work.finish("header", file.stat().st_size)
    left = [entry for entry in plan.entries if entry.name not in work.finished]
    total, to_do = (sum(map(plan.n_bytes, some)) for some in (plan.entries, left))
    progress.begin("exporting", total, total - to_do)
    pieces = [piece for entry in left for piece in _pieces(entry)]
    arrays = stream(
        lambda piece: _convert(piece, plan, checkpoint),
        pieces,
        lambda piece: piece.n_values * _BYTES_PER_VALUE,
        limit=_BYTES_HELD,
    )
    with file.open("r+b") as out, contextlib.closing(arrays):
        # What an interrupted call has written of an unfinished tensor is written anew.
        out.truncate(max(work.finished.values()))
        out.seek(0, os.SEEK_END)
        for entry in left:
            for _ in range(len(_pieces(entry))):
                rows = next(arrays)
                out.write(rows.data)
                progress.advance(rows.nbytes)
                del rows  # before the next ones are made
            if not entry.sources:
                out.write(layout.rope_divisors(plan.model).tobytes())
            _pad(out)
            out.flush()
            os.fsync(out.fileno())
            work.finish(entry.name, out.tell())
    progress.stop()
    return to_do


def _write_header(file: Path, plan: Plan) -> None:
    writer = GGUFWriter(file, architecture.arch_of(plan.model))
    for key, field in plan.fields.items():
        kind, inner = _KINDS[field.kind]
        writer.add_key_value(key, field.value, kind, inner)
    for entry in plan.entries:
        writer.add_tensor_info(
            entry.name, entry.shape, FLOAT32, plan.n_bytes(entry), plan.types[entry.name]
        )
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    with file.open("r+b") as out:
        out.seek(0, os.SEEK_END)
        _pad(out)
        out.flush()
        os.fsync(out.fileno())


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % ALIGNMENT))


def _pieces(entry: Entry) -> list[Piece]:
    """Cuts a tensor into pieces of whole units, in the order of the file."""
    pieces = []
    for number, source in enumerate(entry.sources):
        if len(source.shape) == 1:
            pieces.append(Piece(entry, number, 0, source.shape[0]))
            continue
        step = max(_PIECE // (entry.unit * source.shape[1]), 1)
        for first in range(0, entry.n_units, step):
            last = min(first + step, entry.n_units)
            pieces.append(Piece(entry, number, first * entry.unit, last * entry.unit))
    return pieces


def _convert(piece: Piece, plan: Plan, checkpoint: Checkpoint) -> np.ndarray:
    """Reads a piece and converts it to the bytes of its rows in the file.

    Raises:
      ValueError: it contains NaN or infinity, or values too large for its type.
    """
    entry, kind = piece.entry, plan.types[piece.entry.name]
    source = entry.sources[piece.source]
    rows = np.ascontiguousarray(checkpoint.read_published(source, piece.start, piece.stop))
    if not is_finite(rows):
        raise ValueError(
            f"{checkpoint.path}: {source.name} contains NaN or infinity; export an earlier "
            "checkpoint, or download the file again"
        )
    if kind not in _WIDE and max(rows.max(), -rows.min()) > _LARGEST_HALF:
        raise ValueError(
            f"{checkpoint.path}: {source.name} has values beyond {_LARGEST_HALF:,.0f}, the largest "
            f"that {kind.name} can hold; add the rule {entry.name}=BF16 to --type, first"
        )
    made = gguf.quantize(entry.convert(rows, plan.model), kind)
    return np.ascontiguousarray(made).reshape(-1).view(np.uint8)


def _publish(file: Path, target: Path) -> None:
    """Gives a whole file its name; never that of a file that has appeared meanwhile."""
    if target.exists():
        raise ValueError(f"{target} exists now; remove it, and run the same command again")
    publish(file, target)

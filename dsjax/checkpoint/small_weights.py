"""Reads a checkpoint straight into weights of eight or four bits, FP8 or integers.

A matrix is read and quantised a band of columns at a time, in several threads, so that no more than
a few bands exist in float32, whatever the size of the leaf. Each process quantises the slices of
its own devices only.

Which weights become small: all matrices that a product multiplies by, save

* the router's, whose rounding would send tokens to other experts;
* `wkv_b`, which absorbed attention multiplies by from both sides;
* the embedding, of which a token reads one row;
* those whose share of a device does not divide into blocks (`precision.small_weights.block_size`).

These, norms and biases have the compute type. With int4 the output head is int8. With fp8 it has
the compute type, and of an FP8 checkpoint only its own FP8 matrices are small: their values and
scales are kept to the bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dsjax.checkpoint.slices import Index, bounds
from dsjax.checkpoint.streaming import stream
from dsjax.model.layers import stays_float32
from dsjax.parallel.sharding import split_over
from dsjax.precision.fp8 import WEIGHT_BLOCK, BlockScaled
from dsjax.precision.nibbles import Nibbles, packed
from dsjax.precision.small_weights import (
    bits_per_weight,
    block_size,
    quantize,
    quantize_e4m3,
    scale_type,
)

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
INT8, INT4 = np.dtype(np.int8), np.dtype(ml_dtypes.int4)
SMALL = {"fp8": FP8, "int8": INT8, "int4": INT4}

_STACKED = ("layers", "end_layers", "experts")
_BAND_BYTES = 64 << 20  # of float32 that a thread quantises at a time

Read = Callable[[Index], np.ndarray]


class Stored(NamedTuple):
    """How to read an FP8 leaf as a checkpoint has it."""

    values: Read
    scales: Read  # by blocks
    block: tuple[int, int]  # rows and columns, as of our leaf


def format_of(
    name: str,
    variable: nnx.Variable,
    dtype: np.dtype,
    sharding: NamedSharding | None = None,
    stored: Stored | None = None,
) -> tuple[np.dtype, tuple[int, int]] | None:
    """Returns a declared parameter's element type and block as a small weight; None if it stays.

    Args:
      dtype: fp8, int8 or int4, for the model.
      sharding: how the parameter is split over a mesh.
      stored: the parameter, if the checkpoint has it in FP8.
    """
    axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
    own = [axis for axis in axes if axis not in _STACKED]
    if (
        stays_float32(variable)
        or len(own) != 2
        or own[0] == "vocab"
        or "router_embed" in own
        or name == "wkv_b"
    ):
        return None
    rows, columns = (shape[dim] // _parts(dim, len(shape), sharding) for dim in (-2, -1))
    if dtype != FP8:
        block = block_size(rows)
        return ((INT8 if own[1] == "vocab" else dtype), (block, 1)) if block else None
    if own[1] == "vocab" and not stored:
        return None
    whole = stored.block if stored else WEIGHT_BLOCK
    down, across = block_size(rows, whole[0]), block_size(columns, whole[1])
    return (FP8, (down, across)) if down and across else None


def _parts(dim: int, rank: int, sharding: NamedSharding | None) -> int:
    """Returns how many parts a mesh splits a dimension into."""
    if sharding is None:
        return 1
    names = split_over((*sharding.spec, *[None] * rank)[rank + dim])
    return math.prod(sharding.mesh.shape[name] for name in names)


def stored_bytes(declared: nnx.Module, dtype: np.dtype, compute: np.dtype) -> int:
    """Returns the bytes of a declared model's weights on one device."""
    total = 0.0
    leaves = jax.tree_util.tree_leaves_with_path(declared, is_leaf=_is_variable)
    for keys, variable in leaves:
        small = format_of(str(getattr(keys[-1], "name", keys[-1])), variable, dtype)
        bits = bits_per_weight(*small) if small else 8 * compute.itemsize
        total += np.prod(variable.get_value().shape, dtype=float) * bits / 8
    return int(total)


def load_small(
    read: Read,
    shape: tuple[int, ...],
    dtype: np.dtype,
    block: tuple[int, int],
    sharding: NamedSharding | None,
    stored: Stored | None = None,
) -> BlockScaled:
    """Loads a leaf [..., D, F] as a small weight.

    Args:
      read: returns a slice of the leaf in float32.
      sharding: of the leaf; None: the default device.
      stored: of an FP8 leaf that is to stay as it is.

    Raises:
      ValueError: a weight is not finite.
    """

    def part_of(box: Sequence[tuple[int, int]]) -> BlockScaled:
        return _kept(stored, box, block) if stored else _quantized(read, shape, box, dtype, block)

    if sharding is None:
        whole = part_of([(0, size) for size in shape])
        if dtype == INT4 and jax.default_backend() == "cpu":
            codes: Any = packed(np.asarray(whole.values))
            whole = dataclasses.replace(whole, values=Nibbles(codes))  # pyright: ignore[reportArgumentType]
        return jax.tree.map(jax.device_put, whole)
    boxes = {
        device: tuple(bounds(index or (), shape))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    parts: list[BlockScaled] = []
    last: Any = None
    own: Any = None
    for device, box in sorted(boxes.items(), key=lambda item: item[1]):
        if box != last:  # replicas are adjacent in this order
            last, own = box, part_of(box)
        put = jax.tree.map(lambda leaf, device=device: jax.device_put(leaf, device), own)
        parts.append(jax.block_until_ready(put))
    scales = (*shape[:-2], shape[-2] // block[0], shape[-1] // block[1])
    assemble = jax.make_array_from_single_device_arrays
    return BlockScaled(
        assemble(shape, sharding, [part.values for part in parts]),
        assemble(scales, sharding, [part.scales for part in parts]),
        block,
    )


def _kept(stored: Stored, box: Sequence[tuple[int, int]], block: tuple[int, int]) -> BlockScaled:
    """Reads a box of an FP8 leaf as it is stored."""
    *stack, rows, columns = box
    slots = [slice(*ends) for ends in stack]
    values = stored.values([*slots, slice(*rows), slice(*columns)])
    scales = stored.scales(
        [
            *slots,
            *(slice(*_around(*each)) for each in zip((rows, columns), stored.block, strict=True)),
        ]
    )
    _check_finite(values, scales)
    return BlockScaled(values, _finer(scales, (rows, columns), stored.block, block), block)  # pyright: ignore[reportArgumentType]


def _around(ends: tuple[int, int], size: int) -> tuple[int, int]:
    """Returns the first and the end of the blocks that cover a range."""
    return ends[0] // size, -(-ends[1] // size)


def _finer(
    scales: np.ndarray,
    box: Sequence[tuple[int, int]],
    block: tuple[int, int],
    finer: tuple[int, int],
) -> np.ndarray:
    """Returns the scales of the finer blocks of a box, given those of the blocks that cover it.

    A device's share may begin or end within a block, so its scale is repeated for the parts of it.
    """
    for dim, (start, stop), size, own in zip((-2, -1), box, block, finer, strict=True):
        scales = np.take(scales, np.arange(start, stop, own) // size - start // size, axis=dim)
    return scales


def _check_finite(values: np.ndarray, scales: np.ndarray) -> None:
    codes, step = values.reshape(-1).view(np.uint8), _BAND_BYTES
    pieces = (codes[start : start + step] & 0x7F for start in range(0, codes.size, step))
    not_numbers = sum(int((piece == 0x7F).sum()) for piece in pieces)
    wrong = int((~np.isfinite(scales)).sum())
    if not_numbers or wrong:
        raise ValueError(
            f"{not_numbers} of {values.size} weights are not finite, and {wrong} of {scales.size} "
            "scales; the checkpoint is damaged, or its training diverged"
        )


def _quantized(
    read: Read,
    shape: tuple[int, ...],
    box: Sequence[tuple[int, int]],
    dtype: np.dtype,
    block: tuple[int, int],
) -> BlockScaled:
    """Reads and quantises a box of a leaf, matrix by matrix and band by band, into NumPy arrays."""
    *stack, (top, bottom), (left, right) = box
    sizes = [stop - start for start, stop in stack]
    values = np.empty((*sizes, bottom - top, right - left), dtype)
    scales_shape = (bottom - top) // block[0], (right - left) // block[1]
    scales = np.empty((*sizes, *scales_shape), scale_type(dtype))
    # FP8 has blocks of the whole matrix: what is read around a box makes the same on every mesh.
    down, across = WEIGHT_BLOCK if dtype == FP8 else block
    above, below = top // down * down, min(-(-bottom // down) * down, shape[-2])
    until = min(-(-right // across) * across, shape[-1])
    width = max(_BAND_BYTES // (4 * (below - above)) // across, 1) * across

    def place(task: tuple[tuple[int, ...], int]) -> None:
        slot, begin = task
        end = min(begin + width, until)
        wide = read([*slot, slice(above, below), slice(begin, end)])
        start, stop = max(begin, left), min(end, right)
        inside = slice(top - above, bottom - above), slice(start - begin, stop - begin)
        if dtype == FP8:
            small = quantize_e4m3(wide)
            own = _finer(
                np.asarray(small.scales), ((top, bottom), (start, stop)), WEIGHT_BLOCK, block
            )
        else:
            small = quantize(wide, dtype, block[0])
            own = np.asarray(small.scales)
        at = (*(i - low for i, (low, _) in zip(slot, stack, strict=True)), slice(None))
        values[(*at, slice(start - left, stop - left))] = np.asarray(small.values)[inside]
        scales[(*at, slice((start - left) // block[1], (stop - left) // block[1]))] = own

    slots = itertools.product(*(range(*ends) for ends in stack))
    bands = range(left // across * across, right, width)
    # A band in float32, what it is read from, and what comes of it.
    for _ in stream(place, itertools.product(slots, bands), _band_bytes):
        pass
    return BlockScaled(values, scales, block)  # pyright: ignore[reportArgumentType]


def _band_bytes(task: object) -> int:
    return 4 * _BAND_BYTES


def _is_variable(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)

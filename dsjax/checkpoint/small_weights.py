"""Reads a checkpoint straight into weights of eight or four bits.

A matrix is read and quantised a band of columns at a time, in several threads, so that no more than
a few bands exist in float32, whatever the size of the leaf. Each process quantises the slices of
its own devices only.

Which weights become small: all matrices that a product multiplies by, save

* the router's, whose rounding would send tokens to other experts;
* `wkv_b`, which absorbed attention multiplies by from both sides;
* the embedding, of which a token reads one row;
* those whose share of a device does not divide into blocks (`precision.small_weights.block_size`).

These, norms and biases have the compute type. With int4 the output head is int8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dsjax.checkpoint.slices import Index, bounds
from dsjax.checkpoint.streaming import stream
from dsjax.parallel.sharding import split_over
from dsjax.precision.fp8 import BlockScaled
from dsjax.precision.small_weights import bits_per_weight, block_size, quantize

INT8, INT4 = np.dtype(np.int8), np.dtype(ml_dtypes.int4)
SMALL = {"int8": INT8, "int4": INT4}

_STACKED = ("layers", "end_layers", "experts")
_BAND_BYTES = 64 << 20  # of float32 that a thread quantises at a time

Read = Callable[[Index], np.ndarray]


def format_of(
    name: str,
    variable: nnx.Variable,
    dtype: np.dtype,
    sharding: NamedSharding | None = None,
) -> tuple[np.dtype, int] | None:
    """Returns a declared parameter's element type and block as a small weight; None if it stays.

    Args:
      dtype: int8 or int4, for the model.
      sharding: how the parameter is split over a mesh.
    """
    axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
    own = [axis for axis in axes if axis not in _STACKED]
    if len(own) != 2 or own[0] == "vocab" or "router_embed" in own or name == "wkv_b":
        return None
    parts = 1
    if sharding is not None:
        names = split_over((*sharding.spec, *[None] * len(shape))[len(shape) - 2])
        parts = int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int))
    block = block_size(shape[-2] // parts)
    if block is None:
        return None
    return (INT8 if own[1] == "vocab" else dtype), block


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
    block: int,
    sharding: NamedSharding | None,
) -> BlockScaled:
    """Loads a leaf [..., D, F] as a small weight.

    Args:
      read: returns a slice of the leaf in float32.
      sharding: of the leaf; None: the default device.

    Raises:
      ValueError: see `precision.small_weights.quantize`.
    """
    if sharding is None:
        whole = _quantized(read, [(0, size) for size in shape], dtype, block)
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
            last, own = box, _quantized(read, box, dtype, block)
        put = jax.tree.map(lambda leaf, device=device: jax.device_put(leaf, device), own)
        parts.append(jax.block_until_ready(put))
    scales = (*shape[:-2], shape[-2] // block, shape[-1])
    assemble = jax.make_array_from_single_device_arrays
    return BlockScaled(
        assemble(shape, sharding, [part.values for part in parts]),
        assemble(scales, sharding, [part.scales for part in parts]),
        (block, 1),
    )


def _quantized(
    read: Read, box: Sequence[tuple[int, int]], dtype: np.dtype, block: int
) -> BlockScaled:
    """Reads and quantises a box of a leaf, matrix by matrix and band by band, into NumPy arrays."""
    *stack, (top, bottom), (left, right) = box
    depth = bottom - top
    sizes = [stop - start for start, stop in stack]
    values = np.empty((*sizes, depth, right - left), dtype)
    scales = np.empty((*sizes, depth // block, right - left), ml_dtypes.bfloat16)
    width = max(_BAND_BYTES // (4 * depth), 1)

    def place(task: tuple[tuple[int, ...], int]) -> None:
        slot, start = task
        stop = min(start + width, right)
        small = quantize(read([*slot, slice(top, bottom), slice(start, stop)]), dtype, block)
        at = (*(i - low for i, (low, _) in zip(slot, stack, strict=True)), slice(None))
        values[(*at, slice(start - left, stop - left))] = small.values
        scales[(*at, slice(start - left, stop - left))] = small.scales

    slots = itertools.product(*(range(*ends) for ends in stack))
    # A band in float32, what it is read from, and what comes of it.
    for _ in stream(place, itertools.product(slots, range(left, right, width)), _band_bytes):
        pass
    return BlockScaled(values, scales, (block, 1))  # pyright: ignore[reportArgumentType]


def _band_bytes(task: object) -> int:
    return 4 * _BAND_BYTES


def _is_variable(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)

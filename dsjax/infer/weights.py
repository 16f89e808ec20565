"""Loading a checkpoint's weights in the element type that suits the machine."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsjax.checkpoint.load import Checkpoint, load
from dsjax.checkpoint.small_weights import SMALL, stored_bytes
from dsjax.model.parameters import declarations
from dsjax.model.transformer import Transformer
from dsjax.parallel.sharding import LookUp, generation_spec
from dsjax.precision.policy import Policy

_GGUF_TYPES = {"fp8": "Q8_0", "int8": "Q8_0", "int4": "Q4_0"}  # of about the same size
CONTAINER = "/sys/fs/cgroup"  # where Linux keeps a container's own limits


def load_weights(
    checkpoint: Checkpoint,
    mesh: Mesh | None,
    dtype: str | None,
    look_up: LookUp = generation_spec,
) -> Transformer:
    """Loads a model in the element type chosen by `choose_dtype`, split over the mesh as generation
    wants it or as `look_up` says.
    """
    return load(checkpoint, mesh=mesh, dtype=choose_dtype(checkpoint, dtype), look_up=look_up)


def choose_dtype(checkpoint: Checkpoint, asked: str | None) -> str | None:
    """Chooses the element type of weights and computation; None keeps the checkpoint's.

    `asked` is obeyed; fp8, int8 and int4 are of the weights alone. Otherwise a CPU gets float32 if
    that fits in memory: XLA computes in no other type there, and converts what it is given. Choices
    that cost memory or time are announced on standard error, in one line. `dsjax.load`
    makes no such choice: without a dtype it keeps the checkpoint's.
    """
    if jax.default_backend() != "cpu":
        return asked
    model = Transformer(checkpoint.model, Policy(jnp.float32))
    needed, there = 4 * sum(parameter.count for parameter in declarations(model)), free_memory()
    if asked in SMALL:
        small = stored_bytes(model, SMALL[asked], np.dtype(np.float32))
        _say(
            f"{asked} weights take {small / 1e9:.1f} GB, where float32 takes {needed / 1e9:.1f}, "
            "but a CPU widens them to multiply: here they save memory, not time. For speed run "
            f"llama.cpp: tools/convert.py export {checkpoint.path} out.gguf --type "
            f"{_GGUF_TYPES[asked]}"
        )
        return asked
    if "float32" in (asked, str(checkpoint.dtype)):
        return asked
    figures = f"{needed / 1e9:.1f} GB as float32, with {there / 1e9:.1f} GB of memory free"
    if asked == "bfloat16":
        _say(f"bfloat16 is slower on a CPU than --dtype float32 (weights: {figures})")
        return asked
    if needed > there:
        _say(f"weights stay bfloat16, which is slower on a CPU: they would take {figures}")
        return asked
    _say(f"weights become float32, which is fast on a CPU: {figures}; --dtype bfloat16 keeps them")
    return "float32"


def free_memory() -> int:
    """Returns the bytes of memory available to this process."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if found := re.search(r"MemAvailable: *(\d+)", _content("/proc/meminfo")):
        free = min(free, int(found[1]) << 10)
    if (limit := _content(f"{CONTAINER}/memory.max").strip()).isdecimal():
        free = min(free, int(limit) - int(_content(f"{CONTAINER}/memory.current") or 0))
    return free


def _content(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def _say(line: str) -> None:
    print(line, file=sys.stderr)

"""Which element type does what, and on which kind of machine."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.precision.fp8 import Scale


@dataclasses.dataclass(frozen=True)
class Policy:
    """Element types of a run and the platform whose kernels it uses.

    Master weights, gradients, router, norm statistics, softmax, rope angles and the loss are
    float32 always; `compute` is what activations, and weights at use, are. `platform` is "cpu",
    "gpu" or "tpu": the default is where JAX runs; a program compiled here for elsewhere names it.
    `fp8` is the kind of scale with which linear layers quantise their operands, None for not at
    all.
    """

    compute: DTypeLike = jnp.bfloat16
    platform: str = dataclasses.field(default_factory=jax.default_backend)
    fp8: Scale | None = None

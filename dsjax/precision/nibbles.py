"""int4 on a CPU: two numbers in a byte, of neighbouring rows.

JAX keeps an int4 array on a CPU with a byte per number, and takes parts out of it slowly. A byte
with the numbers of rows 2i and 2i + 1 is twice as small, and two shifts make vectors of either.
Rows in order again would be a copy, so products take them apart: x @ w is the product of the even
channels of x with the even rows of w, plus that of the odd ones.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike


@partial(jax.tree_util.register_dataclass, data_fields=["codes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Nibbles:
    """An int4 array [..., D, F]; a pytree of one leaf, which can be cut in all but the rows.

    codes: int8 [..., D / 2, F], the even rows in the lower halves.
    """

    codes: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, rows, columns = self.codes.shape
        return (*leading, 2 * rows, columns)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.int4)

    def __getitem__(self, index: Any) -> Nibbles:
        """Indexes leading dimensions."""
        return Nibbles(self.codes[index])

    @property
    def even_odd(self) -> tuple[jax.Array, jax.Array]:
        """The even rows and the odd ones, int8."""
        four = jnp.int8(4)
        return (self.codes << four) >> four, self.codes >> four

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """Returns the numbers in `dtype`, rows in order."""
        return jnp.stack(self.even_odd, axis=-2).reshape(self.shape).astype(dtype)


def packed(values: np.ndarray) -> np.ndarray:
    """Returns the codes of int4 [..., D, F], whose rows are even in number."""
    numbers = values.astype(np.int8)
    return (numbers[..., 0::2, :] & 0xF) | (numbers[..., 1::2, :] << 4)

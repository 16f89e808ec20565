"""Convolutions with square kernels, on [batch, rows, columns, channels]."""

from __future__ import annotations

import jax
from flax import nnx

from dsjax.model.layers import Constant, Normal, declare
from dsjax.precision.policy import Policy
from dsjax.vision.projector import STD


class Conv(nnx.Module):
    """A convolution with a kernel [rows, columns, in, out]."""

    def __init__(
        self, size: int, channels_in: int, channels: int, policy: Policy, *, bias: bool = True
    ):
        shape = (size, size, channels_in, channels)
        self.weight = declare(shape, ("latent", "latent", "latent", "latent"), Normal(STD))
        if bias:
            self.bias = declare((channels,), ("norm",), Constant(0.0))
        self.policy = policy

    def __call__(
        self, x_BYXC: jax.Array, *, stride: int = 1, padding: tuple[int, int] | None = None
    ) -> jax.Array:
        """Returns the compute type.

        Args:
          padding: zeros before and after rows and columns; None: as many as keep the size.
        """
        compute, around = self.policy.compute, self.weight.shape[0] // 2
        y_BYXC = jax.lax.conv_general_dilated(
            x_BYXC.astype(compute),
            self.weight[...].astype(compute),
            (stride, stride),
            [padding or (around, around)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if not hasattr(self, "bias"):
            return y_BYXC
        return y_BYXC + self.bias[...].astype(compute)[None, None, None]

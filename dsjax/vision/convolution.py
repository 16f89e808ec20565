"""Convolutions with square kernels, on [batch, rows, columns, channels]."""

from __future__ import annotations

import jax
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from dsjax.model.layers import Constant, Normal, declare
from dsjax.parallel.sharding import partition_spec
from dsjax.parallel.shards import Specs, on_shards
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


class Depthwise(nnx.Module):
    """A convolution that leaves channels apart; its kernel is [rows, columns, 1, channels]."""

    def __init__(self, size: int, channels: int, policy: Policy):
        axes = ("latent", "latent", "latent", "latent")
        self.weight = declare((size, size, 1, channels), axes, Normal(STD))
        self.bias = declare((channels,), ("norm",), Constant(0.0))
        self.policy = policy

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        """Returns as many rows and columns, in the compute type."""
        compute = self.policy.compute
        arguments = x_BYXC.astype(compute), self.weight[...].astype(compute)

        def specs(mesh: AbstractMesh) -> Specs:
            axes = ("batch", "tokens", "tokens", "width")
            split = partition_spec(axes, x_BYXC.shape, mesh, "depthwise convolution")
            return (split, PartitionSpec()), split

        # On each device's own pictures, because XLA (of jax 0.10) gets the kernel's gradient wrong
        # where devices share some: with mesh.data=2 and mesh.tensor=2 it is twice too large.
        y_BYXC = on_shards(_depthwise, arguments, specs)
        return y_BYXC + self.bias[...].astype(compute)[None, None, None]


def _depthwise(x_BYXC: jax.Array, weight: jax.Array) -> jax.Array:
    around = weight.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x_BYXC,
        weight,
        (1, 1),
        [(around, around)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=weight.shape[-1],
    )

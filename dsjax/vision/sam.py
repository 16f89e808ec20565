"""SAM's tower (arXiv:2304.02643), as DeepSeek-VL 7B sees a picture of 1024 x 1024 with it.

Most layers attend inside windows of 14 x 14 patches, a few to the whole picture. Scores add two
tables of relative positions, rows and columns apart, taken from the query before it is scaled.

DeepSeek-VL (arXiv:2403.05525, section 3.1) brings its 64 x 64 features down to the 24 x 24 of the
other tower, and adds those of the first global layer, times a number that begins as 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config.vision import SamConfig
from dsjax.model.layers import Constant, LayerNorm, Normal, declare
from dsjax.parallel.sharding import constrain
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy
from dsjax.vision.convolution import Conv
from dsjax.vision.projector import STD, Linear, gelu


class Attention(nnx.Module):
    """Attention of all patches of a square of `side` x `side` to all."""

    def __init__(self, config: SamConfig, side: int, policy: Policy):
        D, H = config.dim, config.dim // config.n_heads
        self.wqkv = declare((3, D, D), ("latent", "embed", "heads"), Normal(STD))
        self.bqkv = declare((3, D), ("latent", "heads"), Constant(0.0))
        self.rel_pos_h = declare((2 * side - 1, H), ("latent", "latent"), Normal(STD))
        self.rel_pos_w = declare((2 * side - 1, H), ("latent", "latent"), Normal(STD))
        self.proj = Linear(("heads", "embed"), (D, D), policy)
        self.n_heads, self.policy = config.n_heads, policy

    def __call__(self, x_BYXD: jax.Array) -> jax.Array:
        B, Y, X, D = x_BYXD.shape

        def project(weight_DD: jax.Array, bias_D: jax.Array) -> jax.Array:
            y_BYXD = linear(x_BYXD, weight_DD, self.policy)
            y_BYXD = y_BYXD + bias_D.astype(y_BYXD.dtype)[None, None, None]
            return y_BYXD.reshape(B, Y, X, self.n_heads, -1)

        q, k, v = map(project, self.wqkv[...], self.bqkv[...])
        rows_YSH, columns_XSH = (
            _relative(table[...], size).astype(q.dtype)
            for table, size in ((self.rel_pos_h, Y), (self.rel_pos_w, X))
        )

        def attend(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            """Attends from one row of patches: 4096 x 4096 scores per head would be too many."""
            q_BXNH, rows_SH = row
            scores = _scores("bxnh,byznh->bnxyz", q_BXNH, k) * q_BXNH.shape[-1] ** -0.5
            scores = scores + _scores("bxnh,yh->bnxy", q_BXNH, rows_SH)[..., None]
            scores = scores + _scores("bxnh,xzh->bnxz", q_BXNH, columns_XSH)[:, :, :, None]
            weights = jax.nn.softmax(scores.reshape(*scores.shape[:3], Y * X), axis=-1)
            weights = weights.reshape(scores.shape).astype(v.dtype)
            return jnp.einsum("bnxyz,byznh->bxnh", weights, v)

        y = jax.lax.map(attend, (q.swapaxes(0, 1), rows_YSH)).swapaxes(0, 1)
        return self.proj(y.reshape(B, Y, X, D))


def _scores(spec: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)


def _relative(table: jax.Array, size: int) -> jax.Array:
    """Returns the entry for each query and key, [size, size, H]."""
    places = jnp.arange(size)[:, None] - jnp.arange(size)[None] + size - 1
    return table[places]


class Layer(nnx.Module):
    """A pre-norm layer whose attention stays inside windows; a window of 0 is the whole picture."""

    def __init__(self, config: SamConfig, window: int, policy: Policy):
        D, F = config.dim, config.inter_dim
        self.norm1 = LayerNorm(D, config.norm_eps)
        self.attn = Attention(config, window or config.grid, policy)
        self.norm2 = LayerNorm(D, config.norm_eps)
        self.lin1 = Linear(("embed", "ffn"), (D, F), policy)
        self.lin2 = Linear(("ffn", "embed"), (F, D), policy)
        self.window = window

    def __call__(self, x_BYXD: jax.Array) -> jax.Array:
        x_BYXD = constrain(x_BYXD, "batch", "tokens", "tokens", "width")
        normed = self.norm1(x_BYXD)
        x_BYXD = x_BYXD + (self._in_windows(normed) if self.window else self.attn(normed))
        return x_BYXD + self.lin2(gelu(self.lin1(self.norm2(x_BYXD))))

    def _in_windows(self, x_BYXD: jax.Array) -> jax.Array:
        """Attends inside windows; the last ones are filled up with zeros, which are seen too."""
        B, Y, X, D = x_BYXD.shape
        W = self.window
        down, across = -(-Y // W), -(-X // W)
        padded = jnp.pad(x_BYXD, ((0, 0), (0, down * W - Y), (0, across * W - X), (0, 0)))
        windows = padded.reshape(B, down, W, across, W, D).swapaxes(2, 3).reshape(-1, W, W, D)
        whole = self.attn(windows).reshape(B, down, across, W, W, D).swapaxes(2, 3)
        return whole.reshape(padded.shape)[:, :Y, :X]


class Neck(nnx.Module):
    """Two convolutions to the tower's output, each followed by a norm over the channels."""

    def __init__(self, config: SamConfig, policy: Policy):
        C = config.out_channels
        self.conv1 = Conv(1, config.dim, C, policy, bias=False)
        self.norm1 = LayerNorm(C)
        self.conv2 = Conv(3, C, C, policy, bias=False)
        self.norm2 = LayerNorm(C)

    def __call__(self, x_BYXD: jax.Array) -> jax.Array:
        return self.norm2(self.conv2(self.norm1(self.conv1(x_BYXD))))


class Sam(nnx.Module):
    """The tower, and what brings its features down to `grid` x `grid` of another tower."""

    def __init__(self, config: SamConfig, grid: int, policy: Policy):
        D, P, C = config.dim, config.patch_size, config.out_channels
        self.patch = Conv(P, 3, D, policy)
        shape = (config.grid, config.grid, D)
        self.positions = declare(shape, ("latent", "latent", "embed"), Normal(STD))
        self.layers = nnx.List(
            Layer(config, 0 if place in config.global_layers else config.window, policy)
            for place in range(config.n_layers)
        )
        self.neck = Neck(config, policy)
        self.neck_hd = Neck(config, policy)
        self.down1 = Conv(3, C, 2 * C, policy, bias=False)
        self.down2 = Conv(3, 2 * C, 4 * C, policy, bias=False)
        self.alpha = declare((1,), ("norm",), Constant(0.0))
        self.config, self.grid, self.policy = config, grid, policy

    @jax.named_scope("sam")
    def __call__(self, pixels_BYXC: jax.Array) -> jax.Array:
        """Looks at pictures, float32 [B, size, size, 3].

        Returns:
          features [B, grid * grid, 4 * out_channels] in the compute type, row by row.
        """
        stride = self.config.patch_size
        x_BYXD = self.patch(pixels_BYXC, stride=stride, padding=(0, 0))
        x_BYXD = x_BYXD + self.positions[...].astype(x_BYXD.dtype)[None]
        early = x_BYXD
        for place, layer in enumerate(self.layers):
            x_BYXD = layer(x_BYXD)
            if place == self.config.global_layers[0]:
                early = x_BYXD
        late, early = self._down(self.neck(x_BYXD)), self._down(self.neck_hd(early))
        alpha = self.alpha[...].astype(late.dtype)[None, None, None]
        features = late + early * jnp.broadcast_to(alpha, early.shape)
        return features.reshape(features.shape[0], self.grid**2, -1)

    def _down(self, x_BYXC: jax.Array) -> jax.Array:
        """Resizes, bilinearly and without antialiasing, and halves the sides twice."""
        size = (x_BYXC.shape[0], 4 * self.grid, 4 * self.grid, x_BYXC.shape[3])
        x_BYXC = jax.image.resize(x_BYXC, size, "linear", antialias=False)
        return self.down2(self.down1(x_BYXC, stride=2, padding=(1, 1)), stride=2, padding=(1, 1))

"""The choice of experts from sigmoid scores, for few tokens on a Hopper GPU, in one Triton kernel.

What `dsjax.model.router` defines in plain operations takes XLA eight kernels: best two experts of
each group, best groups, best experts, their weights. Decoding has one token per row, so starting
kernels takes the time. Here a token is a program whose scores stay in registers, and each best is
found by one maximum after another. Of equal ones the lower number is chosen, as by `lax.top_k`. A
score that is not a number counts as the greatest, so that an expert's number comes out in any case.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsjax.kernels.target import Target
from dsjax.kernels.varying import by_hand

_MOST_EXPERTS = 1024  # scores that a program holds in registers
_OF_A_WARP, _OF_FOUR = 1024, 4096  # parts of logits that their registers hold


class Rule(NamedTuple):
    """How experts are chosen; hashable, so a static argument."""

    top_k: int
    n_groups: int
    n_limited_groups: int  # of which experts are eligible
    by_best_two: bool  # a group's worth is its two best scores, else its best one
    normalised: bool  # weights sum to `scale`
    scale: float


def fits(n_experts: int, target: Target) -> bool:
    """Returns whether the kernel runs here: no mesh axis may be left to the compiler."""
    return target.is_hopper and by_hand() and n_experts <= _MOST_EXPERTS


def expert_choice(
    logits_XME: jax.Array,
    bias_LE: jax.Array | None,
    layer: jax.Array,
    rule: Rule,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Chooses experts by sigmoid(logit) + bias and weighs them without the bias.

    Args:
      logits_XME: float32, parts of the logits, to be summed.
      bias_LE: float32, of all layers.
      layer: int32 scalar.
      interpret: whether to interpret the kernel, on any machine.

    Returns:
      experts, int32 [M, K], and weights, float32 [M, K].
    """
    if logits_XME.shape[0] * logits_XME.shape[2] > _OF_FOUR:
        logits_XME = logits_XME.sum(axis=0, keepdims=True)
    n_parts, M, E = logits_XME.shape
    if bias_LE is None:
        bias_LE, layer = jnp.zeros((1, E), jnp.float32), jnp.int32(0)
    shape = (M, rule.top_k)
    operands = logits_XME, bias_LE, layer[None]
    chosen = pl.BlockSpec(shape, lambda m: (0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, rule=rule),
        out_shape=(
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        grid=(M,),
        in_specs=[pl.BlockSpec(x.shape, lambda m, n=x.ndim: (0,) * n) for x in operands],
        out_specs=(chosen, chosen),
        compiler_params=triton.CompilerParams(num_warps=1 if n_parts * E <= _OF_A_WARP else 4),
        name="expert_choice",
        interpret=interpret,
    )(*operands)


def _kernel(logits, bias, layer, experts_out, weights_out, *, rule: Rule) -> None:
    token = pl.program_id(0)
    n_parts, _, n_experts = logits.shape
    size = n_experts // rule.n_groups
    # Triton's arrays are powers of two; what is too much holds no expert.
    shape = power_of_two(rule.n_groups), power_of_two(size)
    group_GX = lax.broadcasted_iota(jnp.int32, shape, 0)
    place_GX = lax.broadcasted_iota(jnp.int32, shape, 1)
    expert_GX = group_GX * size + place_GX
    is_one_GX = (group_GX < rule.n_groups) & (place_GX < size)
    part_P11 = lax.broadcasted_iota(jnp.int32, (power_of_two(n_parts), 1, 1), 0)
    parts_PGX = triton.load(
        logits.at[part_P11, token, expert_GX[None]],
        mask=(part_P11 < n_parts) & is_one_GX[None],
        other=0.0,
    )
    scores_GX = jnp.where(is_one_GX, jax.nn.sigmoid(parts_PGX.sum(axis=0)), 0.0)
    of_layer_GX = bias.at[layer[0], expert_GX]
    biased_GX = scores_GX + triton.load(of_layer_GX, mask=is_one_GX, other=0.0)
    biased_GX = jnp.where(jnp.isnan(biased_GX), jnp.inf, biased_GX)
    biased_GX = jnp.where(is_one_GX, biased_GX, -jnp.inf)
    if rule.n_limited_groups < rule.n_groups:
        worth_G = _worth(biased_GX, place_GX, by_best_two=rule.by_best_two)
        kept_G = _best(worth_G, rule.n_limited_groups)
        biased_GX = jnp.where(kept_G[:, None], biased_GX, -jnp.inf)

    choice_K = lax.broadcasted_iota(jnp.int32, (power_of_two(rule.top_k),), 0)
    experts_K = jnp.zeros(choice_K.shape, jnp.int32)
    weights_K = jnp.zeros(choice_K.shape, jnp.float32)
    for number in range(rule.top_k):
        best = biased_GX.max(axis=1).max(axis=0)
        first = jnp.where(biased_GX == best, expert_GX, n_experts).min(axis=1).min(axis=0)
        is_first_GX = expert_GX == first
        # Padding may bear an expert's number; its score is 0.
        score = jnp.where(is_first_GX, scores_GX, 0.0).sum(axis=1).sum(axis=0)
        experts_K = jnp.where(choice_K == number, first, experts_K)
        weights_K = jnp.where(choice_K == number, score, weights_K)
        biased_GX = jnp.where(is_first_GX, -jnp.inf, biased_GX)
    if rule.normalised:
        weights_K = weights_K / (weights_K.sum(axis=0) + 1e-20)
    is_choice_K = choice_K < rule.top_k
    triton.store(experts_out.at[token, choice_K], experts_K, mask=is_choice_K)
    triton.store(weights_out.at[token, choice_K], weights_K * rule.scale, mask=is_choice_K)


def _worth(biased_GX, place_GX, *, by_best_two: bool):
    """Returns what groups are ranked by, [G]."""
    best_G = biased_GX.max(axis=1)
    if not by_best_two:
        return best_G
    is_best_GX = biased_GX == best_G[:, None]
    first_G = jnp.where(is_best_GX, place_GX, place_GX.shape[1]).min(axis=1)
    others_GX = jnp.where(place_GX == first_G[:, None], -jnp.inf, biased_GX)
    return best_G + others_GX.max(axis=1)


def _best(worth_G, count: int):
    """Marks the `count` greatest, bool [G]."""
    number_G = lax.broadcasted_iota(jnp.int32, worth_G.shape, 0)
    kept_G = number_G < 0
    for _ in range(count):
        best = jnp.where(kept_G, -jnp.inf, worth_G).max(axis=0)
        is_best_G = (worth_G == best) & ~kept_G
        first = jnp.where(is_best_G, number_G, worth_G.shape[0]).min(axis=0)
        kept_G = kept_G | (number_G == first)
    return kept_G


def power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()

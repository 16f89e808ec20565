"""Entries of runs of tokens, against the equations run by run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.native_sparse import Stack
from dsjax.model import rope
from dsjax.model.compressor import Compressor, Runs
from dsjax.precision.policy import Policy
from tests.closeness import F32, assert_close
from tests.model.compressed import COMPRESSED, drawn

RATIO, WIDTH, LENGTH = 3, 6, 10
PLAIN = dataclasses.replace(COMPRESSED, rope_theta=50.0)


def made(overlaps: bool) -> Compressor:
    policy = Policy(jnp.float32)
    return drawn(Compressor(PLAIN, policy, ratio=RATIO, width=WIDTH, overlaps=overlaps))


def runs(begins, positions) -> Runs:
    at = jnp.asarray([positions], jnp.int32)
    return Runs(jnp.asarray([begins], jnp.int32), at, rope.angles(at, PLAIN))


def turned(x, position):
    """The last channels as pairs, turned by the position."""
    x, half = x.copy(), PLAIN.qk_rope_head_dim // 2
    for pair in range(half):
        angle = position * 50.0 ** (-pair / half)
        at = len(x) - 2 * half + 2 * pair
        turn = np.exp(1j * angle) * (x[at] + 1j * x[at + 1])
        x[at], x[at + 1] = turn.real, turn.imag
    return x


def entry(compressor, x_TD, begin, position):
    """One entry: a weighted sum per channel, normalised and turned."""
    wkv, wgate, ape, norm = (
        np.asarray(each[...], np.float64)
        for each in (compressor.wkv, compressor.wgate, compressor.ape, compressor.norm.weight)
    )
    values, gates = [], []
    series = [slice(0, WIDTH)]
    if compressor.overlaps:
        series = [slice(WIDTH, None)]
        if position >= RATIO:
            series.insert(0, slice(0, WIDTH))
    for number, channels in enumerate(series):
        start = begin - RATIO * (len(series) - 1 - number)
        for place in range(RATIO):
            token = x_TD[start + place].astype(np.float64)
            values.append((token @ wkv)[channels])
            gates.append((token @ wgate + ape[:, place])[channels])
    weights = np.exp(gates) / np.exp(gates).sum(axis=0)
    summed = (weights * values).sum(axis=0)
    return turned(summed / np.sqrt(np.mean(summed**2) + PLAIN.norm_eps) * norm, position)


@pytest.mark.parametrize("overlaps", [False, True])
def test_entries_equal_the_equations(overlaps):
    """Two documents of 4 and 6 tokens: the second's first run has none before it."""
    compressor = made(overlaps)
    x_TD = np.random.default_rng(0).normal(size=(LENGTH, PLAIN.dim)).astype(np.float32)
    tokens = compressor.of_tokens(jnp.asarray(x_TD[None]))
    begins, positions = (0, 4, 7), (0, 0, 3)
    got = compressor(Stack(tokens[None, :, None], 0), runs(begins, positions))
    want = [entry(compressor, x_TD, *place) for place in zip(begins, positions, strict=True)]
    assert_close(got[0], np.array(want), F32)


def test_runs_beyond_the_tokens_stay_finite():
    compressor = made(True)
    tokens = compressor.of_tokens(jnp.ones((1, LENGTH, PLAIN.dim)))
    got = compressor(Stack(tokens[None, :, None], 0), runs((9, -1), (9, 0)))
    assert np.isfinite(got).all()


def test_numbers_per_token_are_those_that_are_cached():
    for overlaps in (False, True):
        tokens = made(overlaps).of_tokens(jnp.ones((1, 1, PLAIN.dim)))
        assert tokens.shape[-1] == Compressor.token_width(WIDTH, overlaps=overlaps)

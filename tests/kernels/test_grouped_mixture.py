"""Experts that are read once for all rows, interpreted, against the definition of a step."""

import jax.numpy as jnp
import pytest

from dsjax.kernels import grouped_mixture
from tests.kernels.test_mixture_step import (
    assert_equals_the_definition,
    assert_limit_clamps_what_swiglu_reads,
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "layer", "n_shared"), [(17, 1, 2), (2, 2, 0)])
def test_step_equals_the_definition(rows, layer, n_shared, dtype):
    assert_equals_the_definition(grouped_mixture, rows, layer, n_shared, dtype)


def test_limit_clamps_what_swiglu_reads():
    assert_limit_clamps_what_swiglu_reads(grouped_mixture)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.model.mtp import shift_left
from tests.model.tiny import TINY, tiny_model, tokens


def test_shift_left_takes_the_right_neighbour():
    np.testing.assert_array_equal(shift_left(jnp.asarray([[5, 6, 7]])), [[6, 7, 0]])


def test_module_k_sees_k_tokens_further_and_no_more():
    """Prediction k at position i depends on the tokens up to i + k: shown through embedding gradients."""
    model, row, at = tiny_model(), jnp.arange(20, dtype=jnp.int32)[None], 8  # every token once

    def reach(depth):
        def state(table):
            model.embed.weight.set_value(table)
            hidden = model.hidden(row)
            return (hidden.main_BTD if depth == 0 else hidden.mtp_DBTD[depth - 1])[0, at].sum()

        table = model.embed.weight[...]
        gradient = np.asarray(jax.grad(state)(table))
        model.embed.weight.set_value(table)
        return np.flatnonzero(np.abs(gradient).sum(axis=1))

    for depth in range(3):
        np.testing.assert_array_equal(reach(depth), np.arange(at + depth + 1))


def test_modules_leave_the_main_model_alone():
    row = tokens(2, 30)
    with_mtp = tiny_model().hidden(row)
    without = tiny_model(dataclasses.replace(TINY, n_mtp=0)).hidden(row)
    np.testing.assert_array_equal(with_mtp.main_BTD, without.main_BTD)
    assert without.mtp_DBTD is None

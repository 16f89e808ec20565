import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.model.tiny import TINY, tiny_model, tokens


def test_module_k_sees_k_tokens_further_and_no_more():
    """Prediction k at position i reads the tokens up to i + k: embedding gradients show it."""
    dense = dataclasses.replace(TINY, n_layers=1, n_dense_layers=1, n_routed_experts=0)
    row, at = jnp.arange(20, dtype=jnp.int32)[None], 8  # every token once

    @jax.jit
    @jax.jacrev
    def sensitivity(model):
        hidden = model.hidden(row)
        return jnp.concatenate([hidden.main_BTD[None], hidden.mtp_DBTD])[:, 0, at].sum(axis=-1)

    by_depth = np.abs(sensitivity(tiny_model(dense)).embed.weight[...]).sum(axis=-1)
    for depth in range(3):
        np.testing.assert_array_equal(np.flatnonzero(by_depth[depth]), np.arange(at + depth + 1))


def test_modules_leave_the_main_model_alone():
    model, row = tiny_model(), tokens(2, 30)
    with_mtp = jax.jit(lambda model: model.hidden(row))(model)
    without = jax.jit(lambda model: model.hidden(row, mtp=False))(model)
    np.testing.assert_array_equal(with_mtp.main_BTD, without.main_BTD)
    assert without.mtp_DBTD is None

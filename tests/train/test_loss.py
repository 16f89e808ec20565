"""Document borders and routing terms of the pre-training objective. Oracles of the papers are in
test_equivalence.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Config, DataConfig, PrecisionConfig, TrainConfig
from dsjax.train.loss import pretraining, target_mask
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY, tiny_model, tokens
from tests.train.objectives import sums_of


def test_targets_end_at_the_row_at_padding_and_at_isolated_documents():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]], jnp.int32)
    want = {
        (1, False): [1, 1, 1, 1, 0],
        (1, True): [1, 1, 0, 1, 0],
        (2, False): [1, 1, 1, 0, 0],
        (2, True): [1, 0, 0, 0, 0],
        (3, False): [1, 1, 0, 0, 0],
        (3, True): [0, 0, 0, 0, 0],
    }
    for (ahead, isolate), mask in want.items():
        np.testing.assert_array_equal(
            target_mask(segments, ahead, isolate)[0], np.array(mask, bool)
        )


def _config(**data):
    return Config(
        name="x",
        model=TINY,
        data=DataConfig(sequence_length=24, **data),
        train=TrainConfig(loss_chunk=16),
        precision=PrecisionConfig(compute="float32"),
    )


@pytest.mark.parametrize("isolate", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_losses_ignore_what_follows_padding(isolate):
    row = tokens(1, 25)
    segments = jnp.asarray([[1] * 11 + [2] * 6 + [0] * 8], jnp.int32)
    run = jax.jit(
        lambda model, row: sums_of(
            pretraining(_config(isolate_documents=isolate)),
            model,
            {"tokens": row, "segment_ids": segments},
        )
    )
    first, second = run(tiny_model(), row), run(tiny_model(), row.at[0, 17:].set(3))
    assert first[0].keys() == {"main", "mtp", "main_targets", "mtp_targets"}
    for name, value in first[0].items():
        assert_close(second[0][name], value, F32, name)
    assert_close(second[1].balance_loss, first[1].balance_loss, F32, "balance")
    assert float(first[0]["main_targets"]) == (15 if isolate else 16)


def test_model_without_experts_has_no_routing_terms():
    dense = dataclasses.replace(TINY, n_routed_experts=0, n_dense_layers=3, n_mtp=0)
    row = tokens(1, 25)
    batch = {"tokens": row, "segment_ids": jnp.ones_like(row)}
    objective = pretraining(dataclasses.replace(_config(), model=dense))
    sums, routing = sums_of(objective, tiny_model(dense), batch)
    assert routing is None and float(sums["mtp"]) == 0 < float(sums["main"])

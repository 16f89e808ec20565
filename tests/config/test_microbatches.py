"""Batch, micro-batches and their number must agree."""

import pytest

from dsjax.config import MeshConfig, TrainConfig
from dsjax.config.microbatches import check_microbatches, micro_batch_size


@pytest.mark.parametrize(
    ("size", "count", "want"), [(0, 0, 8), (2, 0, 2), (0, 4, 2), (2, 4, 2)], ids=str
)
def test_micro_batch_size_follows_from_either_key(size, count, want):
    train, mesh = TrainConfig(batch_size=8, micro_batch_size=size), MeshConfig(microbatches=count)
    check_microbatches(train, mesh)
    assert micro_batch_size(train, mesh) == want


@pytest.mark.parametrize(
    ("size", "count", "message"),
    [
        (0, 3, r"train\.batch_size=8 does not divide into mesh\.microbatches=3"),
        (4, 4, r"mesh\.microbatches=4 of train\.micro_batch_size=4 do not make up train\.batch"),
    ],
)
def test_what_does_not_divide_is_refused(size, count, message):
    with pytest.raises(ValueError, match=message):
        check_microbatches(
            TrainConfig(batch_size=8, micro_batch_size=size), MeshConfig(microbatches=count)
        )

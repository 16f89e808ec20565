"""How the batch of an optimizer step divides into forward passes: a rule across groups."""

from __future__ import annotations

from dsjax.config.mesh import MeshConfig
from dsjax.config.rules import require
from dsjax.config.train import TrainConfig


def check_microbatches(train: TrainConfig, mesh: MeshConfig) -> None:
    """Checks that `mesh.microbatches` and `train.micro_batch_size` agree with the batch.

    Raises:
      ValueError: they do not; names the keys.
    """
    count, size, batch = mesh.microbatches, train.micro_batch_size, train.batch_size
    require(
        not count or batch % count == 0,
        f"train.batch_size={batch} does not divide into mesh.microbatches={count}",
    )
    require(
        not (count and size) or batch == count * size,
        f"mesh.microbatches={count} of train.micro_batch_size={size} do not make up "
        f"train.batch_size={batch}; set one of the two to 0",
    )


def micro_batch_size(train: TrainConfig, mesh: MeshConfig) -> int:
    """Returns the number of sequences per forward pass."""
    return train.micro_batch_size or train.batch_size // (mesh.microbatches or 1)

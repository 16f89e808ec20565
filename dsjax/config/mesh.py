"""Devices along each mesh axis."""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsjax.axes import AXES
from dsjax.config.rules import require, require_not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one size may be -1 and takes all the devices that are left."""

    data: int = -1  # copies of the model
    fsdp: int = 1  # weights and optimizer state split, gathered at use
    expert: int = 1  # routed experts split, tokens sent to them
    tensor: int = 1  # heads, feed-forward width and vocabulary split
    context: int = 1  # sequences split along their length
    pipe: int = 1  # layers split into stages

    # The order in which the stages of a pipeline work (dsjax.parallel.schedules)
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    # micro-batches that a batch is cut into; 0: into those of train.micro_batch_size
    microbatches: int = 0

    def __post_init__(self) -> None:
        sizes = self.sizes
        for name, size in sizes.items():
            require(
                size > 0 or size == -1,
                f"mesh.{name}={size} must be greater than 0, or -1 for what is left",
            )
        unknown = [name for name, size in sizes.items() if size == -1]
        require(len(unknown) <= 1, f"only one mesh axis may be -1, not {' and '.join(unknown)}")
        require_not_negative("mesh", self, "microbatches")

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, what `dsjax.parallel.mesh.make_mesh` takes."""
        return {axis: getattr(self, axis) for axis in AXES}

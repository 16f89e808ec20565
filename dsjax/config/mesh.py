"""The device mesh of a run and its pipeline schedule."""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsjax.axes import AXES
from dsjax.config.rules import require, require_not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis. One size may be -1, which takes all remaining devices."""

    data: int = -1  # copies of the model
    fsdp: int = 1  # splits weights and optimizer state; weights are gathered at use
    expert: int = 1  # splits the routed experts; tokens are sent to them
    tensor: int = 1  # splits heads, feed-forward width and vocabulary
    context: int = 1  # splits sequences along their length, and weights as fsdp does
    pipe: int = 1  # splits the layers into stages

    # order in which pipeline stages do their forward and backward passes (dsjax.parallel.schedules)
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    # micro-batches per batch; 0: as many as train.micro_batch_size implies
    microbatches: int = 0

    def __post_init__(self) -> None:
        sizes = self.sizes
        for name, size in sizes.items():
            require(
                size > 0 or size == -1,
                f"mesh.{name}={size} must be greater than 0, or -1 for the rest",
            )
        unknown = [name for name, size in sizes.items() if size == -1]
        require(len(unknown) <= 1, f"only one mesh axis may be -1, not {' and '.join(unknown)}")
        require_not_negative("mesh", self, "microbatches")

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, as `dsjax.parallel.mesh.make_mesh` takes them."""
        return {axis: getattr(self, axis) for axis in AXES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutMeshConfig:
    """The same devices in another arrangement, for generation between updates. All 0: that of
    `mesh`. Else 0 means 1, and one size may be -1, which takes all remaining devices.
    """

    data: int = 0
    fsdp: int = 0
    expert: int = 0
    tensor: int = 0

    def __post_init__(self) -> None:
        given = dataclasses.asdict(self)
        for name, size in given.items():
            require(
                size >= -1,
                f"rollout_mesh.{name}={size} must be 0 or more, or -1 for the rest",
            )
        unknown = [name for name, size in given.items() if size == -1]
        require(
            len(unknown) <= 1,
            f"only one axis of rollout_mesh may be -1, not {' and '.join(unknown)}",
        )

    @property
    def sizes(self) -> dict[str, int] | None:
        """Devices along each axis; None if generation keeps the arrangement of training."""
        given = dataclasses.asdict(self)
        return {axis: size or 1 for axis, size in given.items()} if any(given.values()) else None

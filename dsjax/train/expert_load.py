"""How a run's tokens spread over its experts, kept for laying the experts out for serving.

`expert_load.npz` in a run's folder holds the means over the steps since the checkpoint before,
which the router of the newest checkpoint made or nearly so. `dsjax.parallel.eplb.read_load` reads
it and `balance` turns it into a placement.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsjax.files import replacing

FILE_NAME = "expert_load.npz"


class ExpertLoad:
    """Adds up each expert's share of its layer's assignments."""

    def __init__(self) -> None:
        self._sum_LE: np.ndarray | None = None
        self._steps = 0

    def add(self, load_LE: np.ndarray) -> None:
        """Takes one step's shares, [MoE layers and MTP modules, E]; rows sum to 1."""
        load_LE = np.asarray(load_LE, np.float64)
        self._sum_LE = load_LE if self._sum_LE is None else self._sum_LE + load_LE
        self._steps += 1

    def write(self, folder: Path, step: int) -> None:
        """Writes the means over the steps since the last time, the newest being `step`, and starts
        anew. Without routed experts, or without a step, nothing is written.
        """
        if self._sum_LE is None:
            return
        with replacing(folder / FILE_NAME) as file:
            np.savez(file, load_LE=self._sum_LE / self._steps, steps=self._steps, last_step=step)
        self._sum_LE, self._steps = None, 0

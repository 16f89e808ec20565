"""Records how tokens spread over experts, from which serving places the experts on devices.

`expert_load.npz` in a run's folder holds means over the steps since the previous checkpoint, so
they describe the routers of the newest one closely. `dsjax.parallel.eplb.read_load` reads the file
and `balance` turns it into a placement.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsjax.files import replacing

FILE_NAME = "expert_load.npz"


class ExpertLoad:
    """Sums each expert's share of its layer's assignments over steps."""

    def __init__(self) -> None:
        self._sum_LE: np.ndarray | None = None
        self._steps = 0

    def add(self, load_LE: np.ndarray) -> None:
        """Adds one step's shares, [MoE layers and MTP modules, E]; rows sum to 1."""
        load_LE = np.asarray(load_LE, np.float64)
        self._sum_LE = load_LE if self._sum_LE is None else self._sum_LE + load_LE
        self._steps += 1

    def write(self, folder: Path, step: int) -> None:
        """Writes the means over the steps added since the last call, up to `step`, and starts over.
        Writes nothing if no step was added.
        """
        if self._sum_LE is None:
            return
        with replacing(folder / FILE_NAME) as file:
            np.savez(file, load_LE=self._sum_LE / self._steps, steps=self._steps, last_step=step)
        self._sum_LE, self._steps = None, 0

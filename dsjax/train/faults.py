"""Steps that went wrong: batches whose update was skipped, spikes of the loss, and when to stop.

The step itself leaves the state as it was when loss or gradient is not finite (`train.step`). Here
the host counts such steps and writes down which rows of the data they were, a JSON object a line of
`faults.jsonl`. One bad batch costs one step. Since a skipped step changes nothing, the next one has
the same weights and other data; when MAX_SKIPPED of them fail in a row, it is not the data, and no
further step can mend it.

A spike is a loss SIGMAS standard deviations above the mean of the last WINDOW steps. It is said and
written down, and the run goes on: most spikes heal by themselves.
"""

from __future__ import annotations

import collections
import json
import statistics
from pathlib import Path

from dsjax.files import finite

MAX_SKIPPED = 5
WINDOW, FEWEST, SIGMAS = 128, 32, 6.0
_LEAST = 0.02  # of the mean: what a spike is above it at least, where the loss hardly varies


class Faults:
    """What went wrong in a run so far.

    Attributes:
      skipped: steps without an update, earlier sessions included.
      in_a_row: how many of them were the last steps.
    """

    def __init__(self, folder: Path, *, skipped: int, silent: bool = False):
        """`silent` is for all processes but the one that writes."""
        self.path, self.skipped, self.in_a_row = folder / "faults.jsonl", skipped, 0
        self._silent = silent
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def check(
        self, step: int, loss: float, grad_norm: float, rows: range, *, skipped: bool
    ) -> str | None:
        """Takes note of a step.

        Args:
          rows: of the data, that its batch is made of.

        Returns:
          what there is to say of it; None if nothing.

        Raises:
          ValueError: too many steps in a row were skipped.
          OSError: the file cannot be written.
        """
        place = f"rows {rows.start} to {rows.stop - 1} of the data, in {self.path.name}"
        if not skipped:
            self.in_a_row = 0
            above = self._above(loss)
            self._losses.append(loss)
            if above is None:
                return None
            self._write("spike", step, loss, grad_norm, rows)
            return f"step {step}: loss {loss:.4f} is a spike, {above} ({place})"
        self.skipped += 1
        self.in_a_row += 1
        self._write("skipped", step, loss, grad_norm, rows)
        what = f"loss is {loss} and grad_norm {grad_norm}"
        if self.in_a_row == MAX_SKIPPED:
            raise ValueError(
                f"step {step}: {what}, as in the {MAX_SKIPPED - 1} steps before it, so it is not "
                f"the data; nothing of them was saved, and their batches are in {self.path}. Try a "
                "lower optim.learning_rate or a longer optim.warmup_steps in another --workdir"
            )
        return f"step {step}: {what}; skipped, the model is as it was ({place})"

    def _above(self, loss: float) -> str | None:
        """How far a loss is above the last ones, if that is far."""
        if len(self._losses) < FEWEST:
            return None
        mean, spread = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        if loss <= mean + max(SIGMAS * spread, _LEAST * mean):
            return None
        return f"the last {len(self._losses)} being {mean:.4f} +- {spread:.4f}"

    def _write(self, kind: str, step: int, loss: float, grad_norm: float, rows: range) -> None:
        if self._silent:
            return
        line = {"step": step, "kind": kind, **finite({"loss": loss, "grad_norm": grad_norm})}
        line["rows"] = [rows.start, rows.stop]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

"""Steps that went wrong: skipped updates, spikes of the loss, and when to give up.

The step itself leaves the state unchanged when loss or gradient is not finite (`train.step`). Here
the host counts such steps and records the data rows of each as a JSON line of `faults.jsonl`. One
bad batch costs one step: the next step has the same weights and other data. If MAX_SKIPPED steps in
a row fail, the data is not the cause, and no further step can help.

A spike is a loss SIGMAS standard deviations above the mean of the last WINDOW steps. It is reported
and recorded, and the run goes on: most spikes heal by themselves.
"""

from __future__ import annotations

import collections
import json
import math
import statistics
from pathlib import Path

from dsjax.train.report import drop_later

MAX_SKIPPED = 5
WINDOW, FEWEST, SIGMAS = 128, 32, 6.0
_LEAST = 0.02  # of the mean: a smaller rise is no spike, however little the loss varies


class Faults:
    """The faults of a run so far.

    Attributes:
      skipped: steps without an update, earlier sessions included.
      in_a_row: how many of the most recent steps were skipped.
    """

    def __init__(self, folder: Path, *, step: int, skipped: int, silent: bool = False):
        """
        Args:
          step, skipped: steps done so far, and those of them without an update. What the file has
            of later steps is dropped: they will be taken again.
          silent: neither read nor write the file, as in every process but the first.

        Raises:
          OSError: the file cannot be written.
        """
        self.path, self.skipped, self.in_a_row = folder / "faults.jsonl", skipped, 0
        self._silent = silent
        if not silent:
            drop_later(self.path, step)
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def check(
        self, step: int, loss: float, grad_norm: float, rows: range, *, skipped: bool
    ) -> str | None:
        """Checks the numbers of a step.

        Args:
          rows: the data rows of its batch.

        Returns:
          a message for the user; None for an ordinary step.

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
            return f"step {step}: loss {loss:.4f} is a spike: {above} ({place})"
        self.skipped += 1
        self.in_a_row += 1
        self._write("skipped", step, loss, grad_norm, rows)
        what = f"loss is {loss} and grad_norm {grad_norm}"
        if self.in_a_row == MAX_SKIPPED:
            raise ValueError(
                f"step {step}: {what}, as in the {MAX_SKIPPED - 1} steps before it, so the data is "
                f"not the cause; none of these steps was saved, and {self.path} lists their rows. "
                "Try a lower optim.learning_rate or a longer optim.warmup_steps in another "
                "--workdir"
            )
        return f"step {step}: {what}; skipped, the model is unchanged ({place})"

    def _above(self, loss: float) -> str | None:
        """Describes how far a loss is above recent ones; None if it is no spike."""
        if len(self._losses) < FEWEST:
            return None
        mean, spread = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        if loss <= mean + max(SIGMAS * spread, _LEAST * mean):
            return None
        return f"recent steps have {mean:.4f} +- {spread:.4f}"

    def _write(self, kind: str, step: int, loss: float, grad_norm: float, rows: range) -> None:
        if self._silent:
            return
        line = {
            "step": step,
            "kind": kind,
            "loss": _spelled(loss),
            "grad_norm": _spelled(grad_norm),
            "rows": [rows.start, rows.stop],
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _spelled(number: float) -> float | str:
    """Returns a number that JSON can hold, or the name of one that it cannot: which one it was is
    what a fault's line is there to tell.
    """
    return number if math.isfinite(number) else str(number)

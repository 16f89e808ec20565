"""The loop of every training run: take a batch, step, log, evaluate, save.

Steps are dispatched one ahead, unless the source needs what the last one learned: while the device
computes one, the host takes and dispatches the next, and reads the numbers of the one before.
Before evaluating, saving or stopping, the steps under way are waited for.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dsjax.parallel import processes
from dsjax.train import plots
from dsjax.train.expert_load import ExpertLoad
from dsjax.train.report import described
from dsjax.train.session import Session
from dsjax.train.source import Taken
from dsjax.train.throughput import peak_bytes

Metrics = Mapping[str, jax.Array]


class Step(Protocol):
    """A step that is compiled per batch shape, as `dsjax.parallel.compilation.Compiled` is."""

    def is_compiled(self, batch: Any) -> bool: ...
    def compile(self, state: Any, batch: Any, *rest: Any) -> None: ...
    def __call__(self, state: Any, batch: Any, *rest: Any) -> Any: ...


class _Dispatched(NamedTuple):
    """A step that was dispatched and whose numbers have not been read."""

    step: int  # counted from 1
    metrics: Metrics
    taken: Taken  # without its batch, whose memory the step may have back
    learning_rate: float
    exit_code: Any  # of a signal to any process; not waited for


def run_steps(
    session: Session,
    train_step: Step,
    *,
    batch_size: Callable[[int], int],
    knobs: Callable[[int], Mapping[str, Any]],
    evaluate: Callable[[], Mapping[str, float]],
    ahead: int = 1,
) -> None:
    """Takes steps until the run ends or a signal comes; the last step is saved either way.

    Args:
      train_step: (state, batch, knobs) -> (state, metrics). Metrics are scalars, which are logged,
        with at least `loss`, `grad_norm` and `skipped`, true if the step left the state as it was;
        besides, with experts, `expert_load`, which is written at each checkpoint.
      batch_size: step (counted from 0) -> what to take from the source.
      knobs: step (counted from 0) -> what else the step is given: floats, and arrays that it does
        not train; the float `learning_rate` is among them.
      evaluate: returns the held-out numbers of `session.state`; called every train.eval_every steps
        but the last, after which the recipe evaluates in full; empty if nothing is held out.
      ahead: how many steps may be under way when the next is taken; 0 where the source needs what
        the last one learned.
    """
    train, load = session.config.train, ExpertLoad()
    under_way: collections.deque[_Dispatched] = collections.deque()

    def settle(*, leave: int) -> None:
        while len(under_way) > leave:
            dispatched = under_way.popleft()
            _settle(session, dispatched)
            if "expert_load" in dispatched.metrics:
                load.add(np.asarray(dispatched.metrics["expert_load"]))

    session.meter.start()
    for index in range(session.step, train.steps):
        with session.meter.waiting():
            taken = session.source.take(batch_size(index), session.state)
        numbers = knobs(index)
        values = {
            name: np.float32(number) if isinstance(number, float) else number
            for name, number in numbers.items()
        }
        if not train_step.is_compiled(taken.batch):
            settle(leave=0)
            with session.meter.left_out(), session.compiling():
                train_step.compile(session.state, taken.batch, values)
            session.stop.defer()
            session.display.start_steps(session.step, train.steps)
        session.state, metrics = train_step(session.state, taken.batch, values)
        signal = processes.highest(session.stop.exit_code or 0)
        taken = taken._replace(batch={})
        under_way.append(_Dispatched(index + 1, metrics, taken, numbers["learning_rate"], signal))
        done = index + 1
        evaluates, saves = _due(train.eval_every, done), _due(train.checkpoint_every, done)
        settle(leave=ahead)
        if jax.process_count() == 1:
            session.exit_code = session.stop.exit_code or 0
        stops = done == train.steps or session.exit_code > 0
        if evaluates or saves or stops:
            settle(leave=0)
        if saves or stops or _due(train.compare_every, done):
            session.compare_replicas()
        if evaluates and done < train.steps and (found := evaluate()):
            session.log_evaluation(found)
        # The state of a step that was skipped is that of an earlier one, and may be why.
        if stops or (saves and not session.faults.in_a_row):
            if "expert_load" in metrics:
                _write_load(session, load, np.asarray(metrics["expert_load"]))
            session.save()
        if stops:
            return
        if evaluates or saves:
            session.meter.start()
    session.stop.defer()  # all steps were done before


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _write_load(session: Session, load: ExpertLoad, last_LE: np.ndarray) -> None:
    """Writes the experts' load since the last checkpoint and, after the last step, draws it."""
    if session.metrics is None:
        return
    load.write(session.folder, session.step)
    # Drawn here and not when the run is finished, which another session, without a step, may do.
    if session.step == session.config.train.steps:
        plots.draw_expert_load(
            session.folder / "expert_load.png",
            session.metrics.lines(),
            last_LE,
            session.config.name,
        )


def _settle(session: Session, dispatched: _Dispatched) -> None:
    """Waits for a step's numbers, checks them, and logs them if they are due."""
    metrics, taken = dispatched.metrics, dispatched.taken
    loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
    session.step, session.tokens = dispatched.step, session.tokens + taken.tokens
    session.exit_code = max(session.exit_code, int(dispatched.exit_code))
    session.meter.step(taken.tokens)
    session.display.step(session.step)
    skipped, faults, train = bool(metrics["skipped"]), session.faults, session.config.train
    if said := faults.check(session.step, loss, grad_norm, taken.rows, skipped=skipped):
        session.display.say(said)
    first_fine = session.step - faults.skipped == 1
    due = _due(train.log_every, session.step) or session.step == train.steps
    if skipped or session.metrics is None or not (due or first_fine):
        return
    numbers = {
        "loss": loss,
        **{name: np.asarray(value).item() for name, value in metrics.items() if value.ndim == 0},
        **taken.metrics,
        "learning_rate": dispatched.learning_rate,
        **session.meter.take()._asdict(),
        "wall_seconds": session.seconds,
        "memory_bytes": peak_bytes(session.mesh.local_devices),
        "skipped_steps": faults.skipped,
    }
    del numbers["skipped"]
    session.log(numbers)
    session.display.log(session.step, *described(numbers), numbers["step_seconds"])

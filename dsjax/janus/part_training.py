"""Training of one part of a model by itself, on one device: a run of `dsjax.train.session`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from flax import nnx
from rich.console import Console

from dsjax.checkpoint import store
from dsjax.config.janus import TowerTraining, VqTraining
from dsjax.data.loader import Rows
from dsjax.parallel.mesh import make_mesh
from dsjax.train import hyperparameters, loop, session
from dsjax.train.objective import Batch, Knobs, Metrics
from dsjax.train.optimizer import Optimizer, adamw
from dsjax.train.session import Session
from dsjax.train.source import RowSource
from dsjax.train.step import TrainState, abstract_state, compile_step, restored_model, split

Part = TypeVar("Part", bound=nnx.Module)
Step = Callable[[TrainState, Batch, Knobs], tuple[TrainState, Metrics]]


def train(
    config: VqTraining | TowerTraining,
    declared: Part,
    rows: Rows,
    folder: Path,
    *,
    step: Callable[[Optimizer], Step],
    begin: Callable[[], Part],
    reports: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    command: str,
    console: Console,
) -> int:
    """Trains; result and errors are those of `session.run`. What the part learned is in the newest
    checkpoint of the run: `trained`.

    Args:
      declared: the part, without values.
      step: builds the step, whose only knob is `learning_rate`.
      begin: returns the part as it begins.
      reports: picks what the summary has of the last line of metrics.
    """
    mesh, optimizer = make_mesh({"data": 1}, n_devices=1), adamw(config.optim)
    abstract, n = abstract_state(cast(Any, declared), optimizer, mesh), config.train.batch_size

    def first_state() -> TrainState:
        _, params, rest = split(cast(Any, begin()))
        return TrainState(params, rest, optimizer.init(params))

    def learning_rate(number: int) -> float:
        share = hyperparameters.progress(config.train, number)
        return hyperparameters.learning_rate(config.optim, number, share)

    def recipe(under_way: Session) -> None:
        source = RowSource(rows, mesh, micro_batch_size=n, length=2)
        under_way.begin(source, abstract, first_state, mesh=mesh, flops_per_token=1.0)
        compiled = compile_step(step(optimizer), abstract, mesh, display=under_way.display)
        loop.run_steps(
            under_way,
            compiled,
            batch_size=lambda number: n,
            knobs=lambda number: {"learning_rate": learning_rate(number)},
            evaluate=dict,
        )
        if not under_way.exit_code and under_way.metrics is not None:
            under_way.settle()
            found = reports(under_way.metrics.lines()[-1])
            under_way.finish(found, compile_seconds=compiled.seconds)

    return session.run(config, folder, recipe, command=command, console=console)


def trained(config: VqTraining | TowerTraining, declared: Part, folder: Path) -> Part:
    """Reads the part that a run has trained."""
    mesh = make_mesh({"data": 1}, n_devices=1)
    abstract = abstract_state(cast(Any, declared), adamw(config.optim), mesh)
    directory = folder / "checkpoints"
    step = store.latest(directory)
    assert step is not None, "the run has finished"
    state = store.restore(directory, step, abstract)
    return cast(Part, restored_model(cast(Any, declared), state))

"""What a run tells: metrics.jsonl, TensorBoard and W&B to keep, a progress display to watch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dsjax import settings
from dsjax.command import writing
from dsjax.config import Config


class Metrics:
    """Sinks of the logged numbers; pictures and summary come from one of them, metrics.jsonl."""

    def __init__(self, workdir: Path, config: Config, *, first_step: int):
        """Opens the sinks of a run that continues after `first_step` steps.

        Lines of later steps, left by a run that ended after its last checkpoint, are dropped: they
        will be written again.

        Raises:
          ValueError: wandb is asked for and not installed.
          OSError: the files cannot be written.
        """
        self.path = workdir / "metrics.jsonl"
        self._keep_until(first_step)
        self._tensorboard = (
            _open_tensorboard(workdir, first_step) if config.train.tensorboard else None
        )
        self._wandb = _open_wandb(workdir, config) if config.train.wandb_project else None
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one object; it has `step`, and numbers."""
        with writing(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        values = {key: value for key, value in line.items() if key != "step"}
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(f"{_group(key)}/{key}", value, line["step"])
        if self._wandb is not None:
            self._wandb.log(
                {f"{_group(key)}/{key}": value for key, value in values.items()}, step=line["step"]
            )

    def lines(self) -> list[dict[str, Any]]:
        """All objects written so far, also before a resume."""
        return read_lines(self.path)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _keep_until(self, step: int) -> None:
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        partial = self.path.with_name(f".{self.path.name}.partial")
        with writing(partial):
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def _group(key: str) -> str:
    if key in ("eval_loss", "bits_per_byte"):
        return "eval"
    return "speed" if key in ("tokens_per_second", "step_seconds", "mfu") else "train"


def _open_tensorboard(workdir: Path, first_step: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(
        str(workdir / "tensorboard"), purge_step=first_step + 1 if first_step else None
    )


def _open_wandb(workdir: Path, config: Config) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"train.wandb_project={config.train.wandb_project} needs the package wandb; "
            "install it (pip install wandb), or leave train.wandb_project empty"
        ) from error
    return wandb.init(
        project=config.train.wandb_project,
        name=config.name,
        dir=str(workdir),
        config=settings.to_dict(config),
        id=workdir.absolute().as_posix().replace("/", "-").strip("-")[-64:],
        resume="allow",
    )


class Display:
    """The console: a bar at the bottom of a terminal, plain lines anywhere else."""

    def __init__(self, console: Console, *, total_steps: int):
        self._console = console
        self._total = total_steps
        self._progress: Progress | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start_steps(self, done: int) -> None:
        """Begins the display of steps, `done` of them behind; a second call changes nothing."""
        if not self._console.is_terminal or self._progress is not None:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(*columns, *times, console=self._console)
        self._task = self._progress.add_task("", total=self._total, completed=done)
        self._progress.start()

    def step(self, done: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def log(self, line: Mapping[str, Any]) -> None:
        """Shows a line of training metrics."""
        if self._progress is not None:
            text = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
            self._progress.update(self._task, completed=line["step"], description=text)
            return
        left = (self._total - line["step"]) * line["step_seconds"]
        self.say(
            f"step {line['step']}/{self._total}  loss {line['loss']:.4f}  "
            f"mtp {line['mtp_loss']:.4f}  grad_norm {line['grad_norm']:.3f}  "
            f"lr {line['learning_rate']:.3g}  max_violation {line['max_violation']:.2f}  "
            f"{line['tokens_per_second']:,.0f} tokens/s  mfu {100 * line['mfu']:.1f}%  "
            f"eta {duration(left)}"
        )

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def counting(self, what: str) -> Callable[[int, int], None]:
        """A callback (done, total) that shows how far `what` has come."""
        if not self._console.is_terminal:
            return self._counting_in_lines(what)
        progress = Progress(
            TextColumn(what),
            BarColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        task = progress.add_task(what)

        def show(done: int, total: int) -> None:
            progress.start()
            progress.update(task, completed=done, total=total)
            if done >= total:
                progress.stop()

        return show

    def _counting_in_lines(self, what: str) -> Callable[[int, int], None]:
        shown = -1

        def show(done: int, total: int) -> None:
            nonlocal shown
            quarter = 4 * done // max(total, 1)
            if quarter > shown:
                shown = quarter
                self.say(f"{what}: {25 * quarter}%")

        return show


def duration(seconds: float) -> str:
    """3725.0 -> '1:02:05'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

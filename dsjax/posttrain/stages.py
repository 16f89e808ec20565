"""A pipeline of stages: runs each where the last one ended, judges it, and reports.

Each stage is a run in a folder of its own, so each resumes and is skipped once it is done. What a
stage's model can do is kept beside it, in `judged.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dsjax import settings
from dsjax.config import Config, FineTuning, Reinforcement
from dsjax.config.r1 import R1, Stage, StageConfig
from dsjax.files import read_json, write_json
from dsjax.parallel import processes
from dsjax.posttrain import finetuning, game, reinforcement, stage_report
from dsjax.train import pretraining, workdir

_RUN = "{run}"
_TRAINERS: Mapping[type[Any], Callable[..., int]] = {
    Config: pretraining.train,
    FineTuning: finetuning.train,
    Reinforcement: reinforcement.learn,
}


def load(path: str | Path, assignments: Sequence[str] = ()) -> R1:
    """Reads a pipeline from a config file.

    Args:
      assignments: such as `cold_start.train.steps=100`, the name of a stage first.

    Raises:
      FileNotFoundError, ValueError: see `settings.load_config`; or an assignment names no stage.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {path}; the default is configs/r1_tiny.py")
    config = settings.read_python(path, R1)
    given: dict[str, list[str]] = {stage.name: [] for stage in config.stages}
    for assignment in assignments:
        name, _, rest = assignment.partition(".")
        if name not in given or "=" not in rest:
            raise ValueError(
                f"--set {assignment}: write STAGE.KEY=VALUE, with one of the stages "
                f"{', '.join(given)}"
            )
        given[name].append(rest)
    return dataclasses.replace(
        config,
        stages=tuple(
            dataclasses.replace(stage, config=_override(stage, given[stage.name], path))
            for stage in config.stages
        ),
    )


def _override(stage: Stage, assignments: Sequence[str], path: Path) -> StageConfig:
    checked = settings.checked(stage.config, f"{path}: stage {stage.name}")
    try:
        return settings.override(checked, assignments)
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from error


def run(config: R1, folder: Path, *, command: str, console: Console | None = None) -> int:
    """Runs all stages in `folder`, or those that are not done.

    Returns:
      the exit code: 0, or that of the stage that a signal stopped.

    Raises:
      ValueError, OSError: as a stage's own command; the folder is of another pipeline.
    """
    console = console or Console(quiet=not processes.is_first())
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            stack.enter_context(workdir.locked(folder))
            _prepare(config, folder, console)
        processes.wait("the pipeline is prepared")
        reports = []
        for number, stage in enumerate(config.stages, 1):
            console.print(f"[bold]{number}/{len(config.stages)} {stage.name}[/bold]")
            if code := _run_stage(config, stage, folder, command, console):
                return code
            reports.append(_judge(config, stage, folder, console))
            if processes.is_first():
                stage_report.write_report(folder, reports, config.name)
                stage_report.print_stages(reports, console)
    return 0


def _prepare(config: R1, folder: Path, console: Console) -> None:
    """Writes the game's files and pipeline.json, or checks that they are this pipeline's."""
    kept = folder / "pipeline.json"
    wanted = {"name": config.name, "config": settings.content_hash(config)}
    if kept.is_file() and read_json(kept) != wanted:
        raise ValueError(
            f"{folder} holds another pipeline, or this one with other settings; name another "
            "--workdir, or give the same config and --set again"
        )
    if config.game is not None and not (folder / "game" / "held_out.jsonl").is_file():
        console.print(f"writing the countdown game to {folder / 'game'}")
        game.write_game(folder / "game", **dataclasses.asdict(config.game))
    write_json(kept, wanted)

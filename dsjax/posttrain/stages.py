"""A pipeline of stages: runs each where the last one ended, judges it, and reports.

Each stage is a run in a folder of its own, so each resumes and is skipped once it is done. What a
stage's model can do is kept beside it, in `judged.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dsjax import settings
from dsjax.config import Config
from dsjax.config.finetuning import FineTuning
from dsjax.config.r1 import R1, Samples, Stage, StageConfig
from dsjax.config.reinforcement import Reinforcement
from dsjax.display import Display
from dsjax.files import read_json, write_json
from dsjax.generate.sampling import Sampling
from dsjax.parallel import processes
from dsjax.posttrain import finetuning, game, reinforcement, rejection, stage_report
from dsjax.posttrain.evaluation import RIGHT, measure, pass_at_k
from dsjax.posttrain.problems import Problem, read_problems
from dsjax.posttrain.responses import Respondent, Response, Wanted, open_respondent
from dsjax.posttrain.rewards import Grader
from dsjax.train import pretraining, workdir

_RUN = "{run}"
_TRAINERS: Mapping[type[Any], Callable[..., int]] = {
    Config: pretraining.train,
    FineTuning: finetuning.train,
    Reinforcement: reinforcement.learn,
}


def load(path: str | Path, assignments: Sequence[str] = (), *, seed: int | None = None) -> R1:
    """Reads a pipeline from a config file.

    Args:
      assignments: such as `cold_start.train.steps=100`, the name of a stage first.
      seed: of the game and of every stage, in place of the config's own.

    Raises:
      FileNotFoundError, ValueError: see `settings.load_config`; or an assignment names no stage.
    """
    path = settings.find(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no config {path}; the default is configs/pipelines/r1_tiny.py"
        )
    config = settings.read_python(path, R1)
    given: dict[str, list[str]] = {stage.name: [] for stage in config.stages}
    for assignment in assignments:
        name, _, rest = assignment.partition(".")
        if name not in given or "=" not in rest:
            raise settings.WrongAssignment(
                f"--set {assignment}: write STAGE.KEY=VALUE, with one of the stages "
                f"{', '.join(given)}"
            )
        given[name].append(rest)
    if seed is not None:
        given = {name: [f"train.seed={seed}", *own] for name, own in given.items()}
    game = config.game
    if game is not None and seed is not None:
        game = dataclasses.replace(game, seed=seed)
    return dataclasses.replace(
        config,
        game=game,
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
        raise settings.WrongAssignment(f"stage {stage.name}: {error}") from error


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


def _run_stage(config: R1, stage: Stage, folder: Path, command: str, console: Console) -> int:
    """Trains a stage, or goes on with it; returns the exit code."""
    if stage.samples is not None:
        _sample(config, stage.name, stage.samples, folder)
    own = _placed(stage, folder)
    return _TRAINERS[type(own)](own, folder / stage.name, command=command, console=console)


def _sample(config: R1, name: str, samples: Samples, folder: Path) -> None:
    """Writes what a stage learns from, as tools/sample.py does; does nothing if it is there."""
    (folder / name).mkdir(exist_ok=True)
    rejection.run(
        rejection.Order(
            checkpoint=folder / samples.stage,
            prompts=samples.problems.replace(_RUN, str(folder)),
            out=folder / name / "samples.jsonl",
            n=samples.n,
            reward=config.rewards[0],
            keep=samples.keep,
            max_new_tokens=config.max_new_tokens,
            temperature=samples.temperature,
            max_batch=config.max_batch,
        )
    )


def _placed(stage: Stage, folder: Path) -> StageConfig:
    """Returns a stage's config with its paths and its checkpoint filled in."""
    text = json.dumps(settings.to_dict(stage.config))
    text = text.replace(_RUN, json.dumps(str(folder))[1:-1])
    own = settings.from_dict(json.loads(text), f"stage {stage.name}", type(stage.config))
    if isinstance(own, Config):
        return own
    return dataclasses.replace(own, init=str(_checkpoint(stage.init, folder)))


def _checkpoint(init: str, folder: Path) -> Path:
    """Returns the path of an earlier stage's run, or of a checkpoint from elsewhere."""
    return folder / init if (folder / init / "config.json").is_file() else Path(init)


def _judge(config: R1, stage: Stage, folder: Path, console: Console) -> dict[str, Any]:
    """Answers the held-out problems with a stage's model, unless that was done before. Several
    processes open its checkpoint together; the first one then does the rest.
    """
    kept = folder / stage.name / "judged.json"
    if processes.from_first(kept.is_file()):
        return read_json(kept)
    problems = read_problems(config.problems.replace(_RUN, str(folder)), key="problems")
    wanted = Wanted(
        Sampling(temperature=config.temperature), config.max_new_tokens, max_batch=config.max_batch
    )
    respondent = open_respondent(folder / stage.name, problems, wanted, {})
    report = None
    if processes.is_first():
        report = _judged(config, stage, problems, respondent, console)
        report["seconds"] = read_json(folder / stage.name / "summary.json")["wall_seconds"]
        write_json(kept, report)
    return processes.json_from_first(report)


def _judged(
    config: R1,
    stage: Stage,
    problems: Sequence[Problem],
    respondent: Respondent,
    console: Console,
) -> dict[str, Any]:
    """Returns what r1.json says of a stage, but for its time."""
    keys = [(number, sample) for number in range(len(problems)) for sample in range(config.n)]
    with Grader(config.rewards) as grader, Display(console) as display:
        grader.check(problems)
        show, responses = display.counting(f"answering {len(problems):,} held-out problems"), []
        for response in respondent.answers(keys):
            responses.append(response)
            show(len(responses), len(keys))
        responses.sort()
        facts = [respondent.facts[response.key[0]] for response in responses]
        rewards = grader.grade([response.text for response in responses], facts)
    report = _report(config, stage, responses, rewards)
    report["samples"] = [
        {"prompt": problems[number].prompt, "text": responses[number * config.n].text}
        | rewards[number * config.n]
        for number in range(min(config.examples, len(problems)))
    ]
    return report


def _report(
    config: R1,
    stage: Stage,
    responses: Sequence[Response],
    rewards: Sequence[Mapping[str, float | None]],
) -> dict[str, Any]:
    """Returns what r1.json says of a stage, but for its examples and its time."""
    first, n = config.rewards[0], config.n
    right = np.asarray([(reward[first] or 0.0) >= RIGHT for reward in rewards])
    counts = right.reshape(-1, n).sum(axis=1).tolist()
    accuracy = measure([count / n for count in counts])
    ks = sorted({1, n})
    return {
        "name": stage.name,
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "pass_at_k": {str(k): float(np.mean([pass_at_k(n, c, k) for c in counts])) for k in ks},
        "format": float(np.mean([reward.get("format") or 0.0 for reward in rewards])),
        "length": float(np.mean([response.tokens for response in responses])),
        "entropy": sum(each.nats for each in responses) / sum(each.tokens for each in responses),
        "answers": len(responses),
    }

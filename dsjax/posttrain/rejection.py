"""Implements tools/sample.py: many answers per prompt, judged and filtered into training data.

Answers are judged as they come and appended to FILE.jsonl.parts with what they are worth, so a
stopped command, given again, goes on where it was. At the end those that `filters` keeps are
written to FILE.jsonl, in the order of prompts and samples, whatever the order in which they were
drawn; FILE.jsonl.report.json tells settings and what was dropped and why; the parts are removed. A
command of other settings finds a file that is not its own and refuses to touch it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from dsjax import display, files, tables
from dsjax.parallel import processes
from dsjax.posttrain.filters import REASONS, Judged, Keep, sift
from dsjax.posttrain.problems import Problem, read_problems
from dsjax.posttrain.responses import Answering, Respondent, Response
from dsjax.posttrain.rewards import Grader

JUDGED_TOGETHER = 64  # answers, at most; what is drawn but not judged is lost when it is stopped


class Parts:
    """The judged answers so far, in a file that only grows: a line of settings, then one each."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Opens the file, or begins it.

        Raises:
          ValueError: it is of other settings, damaged, or in use by another process.
        """
        self.path = path
        self._file: IO[bytes] = path.open("a+b")
        self._places: dict[tuple[int, int], int] = {}
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(settings)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"{path} is in use by another process; wait until it has ended, or give another "
                "--out"
            ) from None
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        self._file.close()

    def add(self, answers: Sequence[Judged]) -> None:
        """Appends answers and waits until they are on the disk."""
        place = self._file.seek(0, os.SEEK_END)
        for answer in answers:
            line = json.dumps(dataclasses.asdict(answer)).encode() + b"\n"
            self._file.write(line)
            self._places[answer.key] = place
            place += len(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def get(self, key: tuple[int, int]) -> Judged:
        self._file.seek(self._places[key])
        return self._judged(self._file.readline())

    def _judged(self, line: bytes) -> Judged:
        values = json.loads(line)
        return Judged(**{**values, "key": tuple(values["key"])})

    def _read(self, settings: Mapping[str, Any]) -> None:
        first = json.dumps({"settings": settings}).encode() + b"\n"
        self._file.seek(0)
        place = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break  # cut short when the process was killed
            if number == 0:
                _check_same(json.loads(line)["settings"], settings, self.path)
            else:
                self._places[self._judged(line).key] = place
            place += len(line)
        self._file.truncate(place)
        if not place:
            self._file.write(first)
            self._file.flush()


def collect(
    respondent: Respondent,
    grader: Grader,
    parts: Parts,
    n: int,
    screen: display.Display | None = None,
) -> None:
    """Draws and judges the answers that are not yet there, n per problem."""
    count = len(respondent.prompts)
    every = ((number, sample) for number in range(count) for sample in range(n))
    missing = [key for key in every if key not in parts]
    show = screen.counting("samples") if screen else lambda done, total: None
    if missing:
        show(len(parts), count * n)
    responses = respondent.answers(missing)
    while batch := list(itertools.islice(responses, JUDGED_TOGETHER)):
        parts.add(_judge(respondent, grader, batch))
        show(len(parts), count * n)


def select(
    respondent: Respondent, problems: Sequence[Problem], parts: Parts, n: int, keep: Keep
) -> Iterator[tuple[list[dict[str, Any]], dict[str, int]]]:
    """Yields, for each problem, the lines of training data and how many answers are dropped by
    reason.
    """
    for number, problem in enumerate(problems):
        answers = [parts.get((number, sample)) for sample in range(n)]
        kept, dropped = sift(answers, keep)
        yield [training_line(respondent, number, problem, answer) for answer in kept], dropped


def training_line(
    respondent: Respondent, number: int, problem: Problem, answer: Judged
) -> dict[str, Any]:
    """Returns an answer as training data, after what the model was given: messages, or for a base
    model prompt and completion. Where the prompt opened the thought, the reply opens it here.
    """
    given = respondent.prompting.shown(problem)
    about = {"reward": answer.worth, "source": problem.place}
    if isinstance(given, str):
        return {"prompt": given, "completion": answer.text, **about}
    opened = respondent.facts[number]["opened"]
    reply = f"<think>\n{answer.text}" if opened else answer.text
    return {"messages": [*given, {"role": "assistant", "content": reply}], **about}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order(Answering):
    """What tools/sample.py is asked for.

    Attributes:
      prompts: file or glob of problems.
      n: answers per problem.
    """

    prompts: str
    out: Path
    n: int = 16
    reward: str = "rule"
    keep: Keep = "right"


def run(asked: Order) -> None:
    """Draws, judges, filters and writes; shows what was dropped.

    Several processes open the checkpoint together; the first one then does the rest.

    Raises:
      ValueError: the checkpoint, the prompts, the reward or the output cannot be used; all of this
        is checked before the weights are read.
    """
    problems = read_problems(asked.prompts, key="--prompts")
    screen, report = display.Display(Console(stderr=True)), None
    with Grader([asked.reward]) as grader, screen:
        grader.check(problems)
        respondent = asked.respondent(problems)
        if processes.is_first():
            report = _collect_and_write(asked, respondent, grader, problems, screen)
    if report is not None:
        tables.show(report, _print, None)
    processes.wait("the samples are written")


def _collect_and_write(
    asked: Order,
    respondent: Respondent,
    grader: Grader,
    problems: Sequence[Problem],
    screen: display.Display,
) -> dict[str, Any]:
    """Does what is not yet done, and returns the report."""
    settings = _settings(asked, respondent)
    if (found := _finished(asked.out, settings)) is not None:
        screen.say(f"{asked.out} is complete, see {_report_path(asked.out)}")
        return found
    files.check_writable(asked.out)
    parts_path = asked.out.with_name(asked.out.name + ".parts")
    with contextlib.closing(Parts(parts_path, settings)) as parts:
        collect(respondent, grader, parts, asked.n, screen)
        report = _write(asked, respondent, problems, parts, settings)
        parts_path.unlink()
    return report


def _judge(respondent: Respondent, grader: Grader, batch: Sequence[Response]) -> list[Judged]:
    facts = [respondent.facts[response.key[0]] for response in batch]
    rewards = grader.grade([response.text for response in batch], facts)
    return [
        Judged(
            response.key, response.text, response.tokens, response.ended,
            worth=next(iter(reward.values())),
        )
        for response, reward in zip(batch, rewards, strict=True)
    ]  # fmt: skip


def _settings(asked: Order, respondent: Respondent) -> dict[str, Any]:
    """Returns all that decides what the output holds, as JSON values."""
    weights = respondent.checkpoint.weights
    put = json.dumps([respondent.prompts, respondent.facts], sort_keys=True, default=str)
    return {
        "checkpoint": str(asked.checkpoint.absolute()),
        # A run's newest step, which a later command may find to be another.
        "weights": str(weights.folder.absolute()) if weights else None,
        "prompts": hashlib.sha256(put.encode()).hexdigest(),
        "n": asked.n,
        "reward": asked.reward,
        "keep": asked.keep,
        "max_new_tokens": asked.max_new_tokens,
        "dtype": asked.dtype,
        **dataclasses.asdict(respondent.sampling),
    }


def _report_path(out: Path) -> Path:
    return out.with_name(out.name + ".report.json")


def _finished(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the report of an output that is complete; None if there is no output yet.

    Raises:
      ValueError: there is an output that this command did not write.
    """
    if not out.exists():
        return None
    report = _report_path(out)
    if not report.is_file():
        raise ValueError(
            f"{out} exists and has no {report.name} beside it, so this command did not write it; "
            "give another --out, or remove it"
        )
    found = files.read_json(report)
    _check_same(found["settings"], settings, out)
    return found


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    different = [
        f"{key} {found.get(key)!r}, now {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if different:
        raise ValueError(
            f"{path} was made with other settings: {files.listed(different)}; give another --out, "
            "or remove it"
        )


def _write(
    asked: Order,
    respondent: Respondent,
    problems: Sequence[Problem],
    parts: Parts,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes report and output, in this order, and returns the report."""
    dropped, lines, without = Counter[str](), 0, 0
    chosen = select(respondent, problems, parts, asked.n, asked.keep)
    with files.replacing(asked.out) as file:
        for kept, reasons in chosen:
            dropped.update(reasons)
            lines += len(kept)
            without += not kept
            for line in kept:
                file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        report = {
            "samples": len(problems) * asked.n,
            "kept": lines,
            "dropped": {reason: dropped[reason] for reason in REASONS},
            "prompts": len(problems),
            "prompts_without_any": without,
            "settings": dict(settings),
        }
        files.write_json(_report_path(asked.out), report)
    return report


def _print(report: dict[str, Any], console: Console) -> None:
    total = max(report["samples"], 1)
    counts = {"kept": report["kept"], **report["dropped"]}
    rows = [(name, count, f"{100 * count / total:.1f} %") for name, count in counts.items()]
    title = f"{report['samples']:,} samples of {report['prompts']:,} prompts"
    console.print(tables.table(title, ("", ">samples", ">share"), rows))
    console.print(f"{report['prompts_without_any']:,} prompts have no sample that is kept")

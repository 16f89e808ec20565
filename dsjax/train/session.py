"""What every run has, whatever it trains: its folder, checkpoints, metrics, signals and messages.

`run` is the frame from the locked folder to the exit code; inside it, a recipe such as
`dsjax.train.pretraining` is given a `Session`, begins it with its source and state, and hands it to
`dsjax.train.loop.run_steps`.

How a run resumes:
1. workdir.claim: the folder must hold this config's run, up to keys that do not matter.
2. Session.begin: the newest checkpoint whose bytes are all as they were written gives the state,
   the source's position and the number of steps done.
3. Metrics and faults: lines of later steps are dropped, since those steps will be done again.
4. The schedule is a function of the step alone, so nothing else needs to be saved. On a CPU with
   the same versions and cores the resumed run gives the same bits as one never interrupted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from dsjax import settings
from dsjax.checkpoint import store
from dsjax.display import Display
from dsjax.files import finite, listed, write_json
from dsjax.parallel import processes, replicas
from dsjax.signals import StopRequest
from dsjax.train import plots, positions, run_report, workdir
from dsjax.train.faults import Faults
from dsjax.train.report import Metrics
from dsjax.train.source import Source
from dsjax.train.throughput import Meter, Peak, peak_bytes, peak_flops
from dsjax.train.workdir import RunConfig


class Interrupted(Exception):
    """A signal came before the first step, to work that all processes have stopped together and
    that goes on where it was when the run is started again.
    """


def run(
    config: RunConfig,
    folder: Path,
    recipe: Callable[[Session], None],
    *,
    command: str,
    console: Console | None = None,
) -> int:
    """Runs a recipe in `folder`, or takes it up where the folder's newest checkpoint is.

    Args:
      recipe: begins the session, takes its steps and, unless the session then has an exit code,
        finishes it; raises Interrupted where a signal stops what comes before the steps.
      command: the command line that does this, shown to the user as the way to resume.

    With several processes each calls this, with a `folder` that all of them see. Only the first
    process writes there, checkpoints apart, and shows progress.

    Returns:
      the exit code: 0, or 130 or 143 after SIGINT or SIGTERM to any process and a save.

    Raises:
      ValueError: config, data, folder or checkpoint do not fit, or no step is finite any more.
      OSError: a file cannot be read or written.
    """
    console = console or Console(quiet=not processes.is_first())
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            stack.enter_context(workdir.locked(folder))
            workdir.claim(folder, config)
        processes.wait("the folder is claimed")
        workdir.check_shared(folder)
        stop = stack.enter_context(StopRequest())
        display = stack.enter_context(Display(console))
        if processes.from_first(_is_finished(config, folder)):
            display.say(f"{folder} is finished: see summary.json, or raise train.steps to go on")
            return 0
        if processes.is_first():
            (folder / "summary.json").unlink(missing_ok=True)
        with contextlib.closing(Session(config, folder, display, stop)) as session:
            try:
                recipe(session)
            except Interrupted:
                display.stop()
                display.say(f"stopped before the first step; to go on: {command}")
                return session.exit_code
        if session.exit_code:
            session.illustrate()
            display.stop()
            display.say(f"saved after step {session.step}; to resume: {command}")
        return session.exit_code


def _is_finished(config: RunConfig, folder: Path) -> bool:
    step = store.latest(folder / "checkpoints")
    return step is not None and step >= config.train.steps and (folder / "summary.json").is_file()


class Session:
    """A run under way.

    Attributes:
      state: the pytree of arrays that steps train and checkpoints hold.
      step, tokens: optimizer steps done and tokens trained on, earlier sessions included.
      exit_code: of the signal that all processes know of; 0 while there is none.
      metrics: the sinks of logged numbers; None in all processes but the first.
    """

    mesh: Mesh
    source: Source
    state: Any
    step: int
    tokens: int
    faults: Faults
    meter: Meter
    peak: Peak
    checkpoints: store.Store
    metrics: Metrics | None

    def __init__(self, config: RunConfig, folder: Path, display: Display, stop: StopRequest):
        self.config, self.folder, self.display, self.stop = config, folder, display, stop
        self.exit_code, self.metrics = 0, None
        self._started = time.monotonic()
        self._open = contextlib.ExitStack()

    def begin(
        self,
        source: Source,
        abstract_state: Any,
        make_state: Callable[[], Any],
        *,
        mesh: Mesh,
        flops_per_token: float,
    ) -> None:
        """Takes state and source from the newest whole checkpoint, or begins with a new state.

        Args:
          abstract_state: shapes, dtypes and shardings to restore a checkpoint into.
          make_state: makes the state of step 0.
          flops_per_token: that training needs, for the MFU.

        Raises:
          ValueError: processes disagree, or a checkpoint fits neither the state nor the source.
          OSError: a file cannot be read or written.
        """
        self.mesh, self.source = mesh, source
        self._open.callback(source.close)
        processes.check_same(
            {"the config": settings.content_hash(self.config), "the data": source.identity}
        )
        record = self._restore(abstract_state, make_state)
        self.step, self.tokens = record.get("step", 0), record.get("tokens", 0)
        self._seconds_before = record.get("seconds", 0.0)
        self._compiled_before = self._compile_seconds = record.get("compile_seconds", 0.0)
        first, train = processes.is_first(), self.config.train
        self.checkpoints = store.Store(self.folder / "checkpoints", keep=train.keep)
        self._open.callback(self.checkpoints.close)
        self.metrics = Metrics(self.folder, self.config, first_step=self.step) if first else None
        if self.metrics is not None:
            self._open.callback(self.metrics.close)
        skipped = record.get("skipped_steps", 0)
        self.faults = Faults(self.folder, step=self.step, skipped=skipped, silent=not first)
        self.peak = peak_flops(list(mesh.devices.flat))
        self.meter = Meter(
            flops_per_token=flops_per_token, peak=self.peak, before=record.get("meter")
        )
        if first:
            run_report.add_session(self.folder, self.step)

    def _restore(self, abstract_state: Any, make_state: Callable[[], Any]) -> dict[str, Any]:
        """Sets the state; returns the record saved with it, empty for a new state."""
        directory = self.folder / "checkpoints"
        step = store.newest_whole(directory, set_aside=True, say=self.display.say)
        if step is None:
            self.state = make_state()
            return {}
        record = store.read_record(directory, step)
        self.state = store.restore(directory, step, abstract_state)
        self.display.say(f"resuming {self.folder} after step {step} of {self.config.train.steps}")
        if changed := workdir.changed_versions(record["versions"]):
            self.display.say(
                f"since then changed: {', '.join(changed)}; the run goes on, perhaps not bit for "
                "bit"
            )
        self.source.restore(record["data"])
        return record

    def close(self) -> None:
        """Waits for the last checkpoint, and closes files and threads."""
        self._open.close()

    @property
    def seconds(self) -> float:
        """Wall time of the whole run, earlier sessions included."""
        return self._seconds_before + time.monotonic() - self._started

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Counts the time inside as compiling the steps, which checkpoints remember."""
        began = time.monotonic()
        yield
        self._compile_seconds += time.monotonic() - began

    def log(self, numbers: Mapping[str, Any]) -> None:
        """Writes a line of numbers, those of the newest step, to the sinks."""
        if self.metrics is not None:
            self.metrics.write({"step": self.step, "tokens": self.tokens, **numbers})

    def log_evaluation(self, numbers: Mapping[str, float]) -> None:
        """Writes the numbers of an evaluation to the sinks and, but for the losses by position, to
        the console, and renews pictures and report.
        """
        self.log(numbers)
        self.illustrate()
        shown = ", ".join(
            f"{name} {value:.4f}"
            for name, value in numbers.items()
            if not positions.is_by_position(name)
        )
        self.display.say(f"held-out after step {self.step}: {shown}")

    def illustrate(self) -> None:
        """Draws the curves of the run so far, and writes report.md; only the first process does."""
        if self.metrics is not None:
            plots.draw_curves(self.folder, self.metrics.lines(), self.config.name)
            run_report.write_report(self.folder)

    def interrupted(self) -> bool:
        """Returns whether any process has received a signal. All of them must ask together."""
        self.exit_code = int(processes.highest(self.stop.exit_code or 0))
        return self.exit_code > 0

    def compare_replicas(self) -> None:
        """Checks that all devices that replicate a part of the state hold equal copies of it.

        Raises:
          ValueError: some differ; names arrays and devices.
        """
        found = replicas.mismatches(store.named_arrays(self.state), self.mesh)
        if found:
            devices = sorted({str(device) for wrong in found for device in wrong.devices})
            raise ValueError(
                f"after step {self.step} {', '.join(devices)} hold other values than their copies: "
                f"{listed([wrong.name for wrong in found])}. This state was not saved. A device's "
                "memory or link is faulty: take it out of service and run the same command again, "
                "which resumes from the newest checkpoint, whose copies were equal"
            )

    def save(self) -> None:
        """Starts to save the state and what a resumed run needs beside it."""
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "data": self.source.state(),
            "seconds": self.seconds,
            "meter": self.meter.state(),
            "compile_seconds": self._compile_seconds,
            "skipped_steps": self.faults.skipped,
            "config_hash": settings.content_hash(self.config),
            "versions": workdir.versions(),
        }
        self.checkpoints.save(self.step, self.state, record)

    def settle(self) -> None:
        """Ends the display of steps and waits for the last checkpoint.

        Raises:
          ValueError: nothing was learned.
        """
        self.display.stop()
        self.checkpoints.wait()
        if self.faults.skipped >= self.step:
            raise ValueError(f"no step of this run had a finite loss; see {self.faults.path}")

    def throughput(self) -> dict[str, Any]:
        """Returns the rates of a summary, where every step trains on as many tokens."""
        rates = self.meter.whole()
        return {
            "tokens_per_second": rates and rates.tokens_per_second,
            "data_seconds": rates and rates.data_seconds,
            "mfu": rates and rates.mfu,
            "peak": self.peak.source,
        }

    def finish(self, found: Mapping[str, Any], *, compile_seconds: float) -> dict[str, Any]:
        """Writes summary.json, which makes the run a finished one; the first process calls this.

        Args:
          found: what the recipe has to say.
          compile_seconds: of this session's programs.

        Returns:
          the summary: that, and what is true of any run.
        """
        rates = self.meter.whole()
        summary = {
            "name": self.config.name,
            "steps": self.step,
            "tokens": self.tokens,
            **found,
            "skipped_steps": self.faults.skipped,
            "wall_seconds": self.seconds,
            "compile_seconds": self._compiled_before + compile_seconds,
            "memory_bytes": peak_bytes(self.mesh.local_devices),
            "median_step_seconds": rates and rates.step_seconds,
        }
        write_json(self.folder / "summary.json", finite(summary))
        self.illustrate()
        return summary

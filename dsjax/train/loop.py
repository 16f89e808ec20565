"""A training run from start to end: prepare or resume, step, log, evaluate, save, and sum up.

Steps are dispatched one ahead: while the device computes one, the host prepares and dispatches the
next, and reads the numbers of the one before. Before evaluating, saving or stopping, the steps on
the way are waited for.

How a run resumes:
1. workdir.claim: the folder must hold this config's run, up to keys that do not matter.
2. setup: the newest checkpoint that is as it was written, every byte of it, gives the state, the
   position in the data and the number of steps done.
3. Metrics: lines of later steps are dropped, since those steps will be done again.
4. The schedule is a function of the step alone, so nothing else is remembered. On a CPU with the
   same versions and cores the resumed run gives the same bits as one that was never stopped.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dsjax import settings
from dsjax.checkpoint import store
from dsjax.config import Config
from dsjax.display import Display
from dsjax.files import listed, write_json
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.parallel import processes, replicas
from dsjax.train import hyperparameters, plots, workdir
from dsjax.train.evaluate import Evaluation, evaluate
from dsjax.train.report import described
from dsjax.train.setup import Run, prepare
from dsjax.train.signals import StopRequest
from dsjax.train.step import declared_model, restored_model
from dsjax.train.summary import compressed_bits_per_byte, print_summary

_PROMPT_TOKENS = 32  # of a held-out document, for the sample at the end

# Steps that were dispatched: number, metrics, and the signal's exit code that any process had.
OnTheWay = collections.deque[tuple[int, dict[str, jax.Array], Any]]


def train(config: Config, folder: Path, *, command: str, console: Console | None = None) -> int:
    """Runs a config in `folder`, or takes it up where the folder's newest checkpoint is.

    Args:
      command: the command line that does this, shown to the user as the way to resume.

    With several processes each of them calls this, and `folder` is one that all of them see. The
    first one alone writes there, but for checkpoints, and shows how the run goes.

    Returns:
      exit code: 0; 130 or 143 after SIGINT or SIGTERM to any process, the run having been saved.

    Raises:
      ValueError: config, data, folder or checkpoint do not fit, or the loss stays not finite.
      OSError: a file cannot be read or written.
    """
    console = console or Console(quiet=not processes.is_first())
    # Where there are several processes, the first one writes.
    with workdir.locked(folder) if processes.is_first() else contextlib.nullcontext():
        return _train(config, folder, command, console)


def _train(config: Config, folder: Path, command: str, console: Console) -> int:
    if processes.is_first():
        workdir.claim(folder, config)
    processes.wait("the folder is claimed")
    workdir.check_shared(folder)
    if processes.from_first(_is_finished(config, folder)):
        console.print(
            f"{folder} is finished: see summary.json, or raise train.steps to go on",
            highlight=False,
        )
        return 0
    if processes.is_first():
        (folder / "summary.json").unlink(missing_ok=True)
    with StopRequest() as stop, Display(console) as display:
        run = prepare(config, folder, display, stop)
        try:
            _run_steps(run)
            summary = _finish(run) if not run.exit_code else None
        finally:
            run.loader.close()
            if run.metrics is not None:
                run.metrics.close()
            run.checkpoints.close()
        if run.exit_code:
            display.stop()
            display.say(f"saved after step {run.step}; to resume: {command}")
            return run.exit_code
    if summary is not None:
        print_summary(console, summary)
    return 0


def _is_finished(config: Config, folder: Path) -> bool:
    step = store.latest(folder / "checkpoints")
    return step is not None and step >= config.train.steps and (folder / "summary.json").is_file()


def _run_steps(run: Run) -> None:
    """Steps until the end of the run or a signal; the last step is saved either way."""
    train = run.config.train
    on_the_way: OnTheWay = collections.deque()
    for index in range(run.step, train.steps):
        batch = run.take_batch(hyperparameters.batch_size(train, index))
        knobs = {
            name: np.float32(value)
            for name, value in hyperparameters.knobs(run.config, index).items()
        }
        if not run.train_step.is_compiled(batch):
            _settle(run, on_the_way, leave=0)
            run.train_step.compile(run.state, batch, knobs)
            run.stop.defer()
            run.display.start_steps(run.step, train.steps)
            run.meter.start()
        run.state, metrics = run.train_step(run.state, batch, knobs)
        on_the_way.append((index, metrics, processes.highest(run.stop.exit_code or 0)))
        done = index + 1
        evaluates, saves = _due(train.eval_every, done), _due(train.checkpoint_every, done)
        _settle(run, on_the_way, leave=1)
        if jax.process_count() == 1:
            run.exit_code = run.stop.exit_code or 0
        stops = done == train.steps or run.exit_code > 0
        if evaluates or saves or stops:
            _settle(run, on_the_way, leave=0)
        if saves or stops or _due(train.compare_every, done):
            _compare_replicas(run)
        if evaluates and done < train.steps:
            _log_evaluation(run, _evaluate(run, run.heldout.spread(train.eval_sequences)))
        if done == train.steps:
            _draw_expert_load(run, metrics)
        # The state of a step that was skipped is that of an earlier one, and may be why.
        if stops or (saves and not run.faults.in_a_row):
            _save(run)
        if stops:
            return
        if evaluates or saves:
            run.meter.start()
    run.stop.defer()  # all steps were done before


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _settle(run: Run, on_the_way: OnTheWay, *, leave: int) -> None:
    """Waits for the oldest steps until `leave` are left; checks their numbers, logs what is due."""
    while len(on_the_way) > leave:
        index, metrics, exit_code = on_the_way.popleft()
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        run.step, run.exit_code = index + 1, max(run.exit_code, int(exit_code))
        run.meter.step(
            hyperparameters.batch_size(run.config.train, index) * run.config.data.sequence_length
        )
        run.display.step(run.step)
        if "expert_load" in metrics:
            run.expert_load.add(np.asarray(metrics["expert_load"]))
        skipped = bool(metrics["skipped"])
        first = hyperparameters.sequences_before(run.config.train, index)
        rows = first, hyperparameters.sequences_before(run.config.train, index + 1)
        if said := run.faults.check(run.step, loss, grad_norm, rows, skipped=skipped):
            run.display.say(said)
        first_fine = run.step - run.faults.skipped == 1
        due = _due(run.config.train.log_every, run.step) or run.step == run.config.train.steps
        if not skipped and (due or first_fine):
            _log(run, loss, grad_norm, metrics)


def _compare_replicas(run: Run) -> None:
    """Checks that devices which should hold equal copies do; each checkpoint is of such a state.

    Raises:
      ValueError: they do not; names arrays and devices.
    """
    found = replicas.mismatches(store.named_arrays(run.state), run.mesh)
    if found:
        devices = sorted({str(device) for wrong in found for device in wrong.devices})
        raise ValueError(
            f"after step {run.step} {', '.join(devices)} hold other values than their copies: "
            f"{listed([wrong.name for wrong in found])}. Nothing of it was saved. Memory or link "
            "of a device is not to be trusted: take it out of service, then run the same command "
            "again: it goes on from the newest checkpoint, whose copies were equal"
        )


def _log(run: Run, loss: float, grad_norm: float, metrics: dict[str, jax.Array]) -> None:
    if run.metrics is None:
        return
    line = {
        "step": run.step,
        "tokens": hyperparameters.tokens_before(run.config, run.step),
        "loss": loss,
        "mtp_loss": float(metrics["mtp_loss"]),
        "balance_loss": float(metrics["balance_loss"]),
        "grad_norm": grad_norm,
        "learning_rate": hyperparameters.knobs(run.config, run.step - 1)["learning_rate"],
        **run.meter.take()._asdict(),
        "max_violation": float(metrics["max_violation"]),
        "dropped_tokens": int(metrics["dropped_tokens"]),
        "skipped_steps": run.faults.skipped,
    }
    run.metrics.write(line)
    run.display.log(run.step, *described(line), line["step_seconds"])


def _evaluate(run: Run, rows: Sequence[int], **options: Any) -> Evaluation | None:
    def score(batch: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
        return run.score(run.state, run.place(batch))

    return evaluate(score, run.heldout, rows, batch_size=run.config.micro_batch_size, **options)


def _log_evaluation(run: Run, result: Evaluation | None) -> None:
    assert result is not None
    if run.metrics is None:
        return
    line = {
        "step": run.step,
        "tokens": hyperparameters.tokens_before(run.config, run.step),
        "eval_loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
    }
    run.metrics.write(line)
    run.display.say(
        f"held-out after step {run.step}: loss {result.loss:.4f}, "
        f"{result.bits_per_byte:.4f} bits per byte"
    )


def _save(run: Run) -> None:
    record = {
        "step": run.step,
        "tokens": hyperparameters.tokens_before(run.config, run.step),
        "progress": hyperparameters.progress(run.config, run.step),
        "data": run.loader.state(),
        "seconds": run.seconds,
        "skipped_steps": run.faults.skipped,
        "config_hash": settings.content_hash(run.config),
        "versions": workdir.versions(),
    }
    run.checkpoints.save(run.step, run.state, record)
    if processes.is_first():
        run.expert_load.write(run.folder, run.step)


def _draw_expert_load(run: Run, metrics: dict[str, jax.Array]) -> None:
    """Draws the experts' load, before the last checkpoint puts the last step out of reach."""
    if "expert_load" in metrics and run.metrics is not None:
        load_LE = np.asarray(metrics["expert_load"])
        plots.draw_expert_load(
            run.folder / "expert_load.png", run.metrics.lines(), load_LE, run.config.name
        )


def _finish(run: Run) -> dict[str, Any] | None:
    """Evaluates on all held-out text, writes a sample, draws the loss and writes summary.json.

    Returns:
      what summary.json holds; None if a signal came (the same command finishes later), and in all
      processes but the first.
    """
    run.display.stop()
    run.checkpoints.wait()
    if run.faults.skipped >= run.step:
        raise ValueError(f"no step of this run had a finite loss; see {run.faults.path}")
    run.display.say(f"scoring all {len(run.heldout):,} held-out sequences")
    result = _evaluate(run, range(len(run.heldout)), interrupted=lambda: _is_interrupted(run))
    if result is None:
        return None
    sample = _sample(run)
    if run.metrics is None:
        return None
    if run.metrics.lines()[-1].get("eval_loss") is None:
        _log_evaluation(run, result)
    lines = run.metrics.lines()
    plots.draw_loss(run.folder / "loss.png", lines, run.config.name)
    logged = [line for line in lines if "loss" in line]
    rates = run.meter.whole()
    summary = {
        "name": run.config.name,
        "steps": run.step,
        "tokens": hyperparameters.tokens_before(run.config, run.step),
        "loss": logged[-1]["loss"],
        "mtp_loss": logged[-1]["mtp_loss"],
        "eval_loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        **compressed_bits_per_byte(text for _, text in run.corpus.heldout_texts()),
        "max_violation_first": logged[0]["max_violation"],
        "max_violation_last": logged[-1]["max_violation"],
        "dropped_tokens": max(line["dropped_tokens"] for line in logged),
        "skipped_steps": run.faults.skipped,
        "wall_seconds": run.seconds,
        "compile_seconds": run.train_step.seconds + run.score.seconds,
        "median_step_seconds": rates and rates.step_seconds,
        "tokens_per_second": rates and rates.tokens_per_second,
        "mfu": rates and rates.mfu,
        "peak": run.peak.source,
        "sample": sample,
    }
    write_json(run.folder / "summary.json", summary)
    return summary


def _is_interrupted(run: Run) -> bool:
    run.exit_code = int(processes.highest(run.stop.exit_code or 0))
    return run.exit_code > 0


def _sample(run: Run) -> dict[str, str] | None:
    """Lets the model continue the beginning of the first held-out document."""
    n_tokens, most = run.config.train.sample_tokens, run.config.model.max_seq_len
    if not n_tokens:
        return None
    tokenizer = run.corpus.tokenizer
    prompt = [tokenizer.special.bos, *run.corpus.heldout[0][:_PROMPT_TOKENS].tolist()]
    prompt = prompt[: most // 2]
    request = Request(
        tuple(prompt),
        min(n_tokens, most - len(prompt)),
        Sampling(temperature=0.7, top_p=0.95, seed=run.config.train.seed % 2**32),
    )
    completion: list[int] = []
    declared = declared_model(run.config.model, run.config.precision)
    for (new,) in Engine(restored_model(declared, run.state)).generate([request]):
        completion += new
    return {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(completion)}

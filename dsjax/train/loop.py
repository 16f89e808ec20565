"""A training run from start to end: prepare or resume, step, log, evaluate, save, and sum up.

Steps are dispatched one ahead: while the device computes one, the host prepares and dispatches the next, and reads
the numbers of the one before. Before evaluating, saving or stopping, the steps on the way are waited for.

How a run resumes:
1. workdir.claim: the folder must hold this config's run, up to keys that do not matter.
2. setup: the newest whole checkpoint gives the state, the position in the data and the number of steps done.
3. Metrics: lines of later steps are dropped, since those steps will be done again.
4. The schedule is a function of the step alone, so nothing else is remembered. On a CPU with the same versions
   and cores the resumed run gives the same bits as one that was never stopped.
"""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dsjax import settings
from dsjax.checkpoint import store
from dsjax.config import Config
from dsjax.infer.sampling import complete
from dsjax.train import plots, schedule, workdir
from dsjax.train.evaluate import Evaluation, evaluate
from dsjax.train.report import Display
from dsjax.train.setup import Run, prepare
from dsjax.train.signals import StopRequest
from dsjax.train.step import restored_model
from dsjax.train.summary import compressed_bits_per_byte, print_summary

_PROMPT_TOKENS = 32  # of a held-out document, for the sample at the end


def train(config: Config, folder: Path, *, command: str, console: Console | None = None) -> int:
    """Runs a config in `folder`, or takes it up where the folder's newest checkpoint is.

    Args:
      command: the command line that does this, shown to the user as the way to resume.

    Returns:
      exit code: 0; 130 or 143 after SIGINT or SIGTERM, the run having been saved.

    Raises:
      ValueError: config, data, folder or checkpoint do not fit together, or the loss is no longer finite.
      OSError: a file cannot be read or written.
    """
    console = console or Console()
    workdir.claim(folder, config)
    if _is_finished(config, folder):
        console.print(f"{folder} is finished: see summary.json, or raise train.steps to go on", highlight=False)
        return 0
    (folder / "summary.json").unlink(missing_ok=True)
    with StopRequest() as stop, Display(console, total_steps=config.train.steps) as display:
        run = prepare(config, folder, display, stop)
        with jax.set_mesh(run.mesh):
            try:
                _run_steps(run)
                if stop.exit_code is None:
                    summary = _finish(run)
            finally:
                run.loader.close()
                run.metrics.close()
                run.checkpoints.close()
        if stop.exit_code is not None:
            display.stop()
            display.say(f"saved after step {run.step}; to resume: {command}")
            return stop.exit_code
    print_summary(console, summary)
    return 0


def _is_finished(config: Config, folder: Path) -> bool:
    step = store.latest(folder / "checkpoints")
    return step is not None and step >= config.train.steps and (folder / "summary.json").is_file()


def _run_steps(run: Run) -> None:
    """Steps until the end of the run or a signal; the last step is saved either way."""
    train = run.config.train
    if run.step == train.steps:
        return
    on_the_way: collections.deque[tuple[int, Any]] = collections.deque()
    for index in range(run.step, train.steps):
        batch = _take_batch(run, index)
        knobs = {name: np.float32(value) for name, value in schedule.knobs(run.config, index).items()}
        if index == run.step:
            run.train_step.prepare(run.state, batch, knobs)
            run.stop.defer()
            run.display.start_steps(run.step)
            run.meter.start()
        run.state, metrics = run.train_step(run.state, batch, knobs)
        on_the_way.append((index, metrics))
        done = index + 1
        evaluates, saves = _due(train.eval_every, done), _due(train.checkpoint_every, done)
        stops = done == train.steps or run.stop.exit_code is not None
        while len(on_the_way) > (0 if evaluates or saves or stops else 1):
            _settle(run, *on_the_way.popleft())
        if evaluates and done < train.steps:
            _log_evaluation(run, _evaluate_some(run))
        if stops and done == train.steps:
            _draw(run, metrics)
        if saves or stops:
            _save(run)
        if stops:
            return
        if evaluates or saves:
            run.meter.start()


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _take_batch(run: Run, index: int) -> dict[str, jax.Array]:
    """The batch of a step, [micro-batches, sequences, T + 1]."""
    rows = run.loader.take(schedule.batch_size(run.config.train, index))
    shape = (-1, run.rows_per_pass, run.config.data.sequence_length + 1)
    return run.place({name: array.reshape(shape) for name, array in rows.items()})


def _settle(run: Run, index: int, metrics: dict[str, jax.Array]) -> None:
    """Waits for a step, checks its numbers, and logs them where they are due."""
    loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
    train, done = run.config.train, index + 1
    tokens = schedule.batch_size(train, index) * run.config.data.sequence_length
    run.meter.step(tokens)
    run.step = done
    run.display.step(done)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        saved = store.latest(run.folder / "checkpoints")
        since = f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
        raise ValueError(
            f"step {done}: loss is {loss} and grad_norm {grad_norm}, which no further step can mend; nothing of it was saved, "
            f"{since}. Try a lower optim.learning_rate or a longer optim.warmup_steps in another --workdir"
        )
    if _due(train.log_every, done) or done in (1, train.steps):
        rates = run.meter.take()
        line = {
            "step": done,
            "tokens": schedule.tokens_before(run.config, done),
            "loss": loss,
            "mtp_loss": float(metrics["mtp_loss"]),
            "balance_loss": float(metrics["balance_loss"]),
            "grad_norm": grad_norm,
            "learning_rate": schedule.knobs(run.config, index)["learning_rate"],
            **rates._asdict(),
            "max_violation": float(metrics["max_violation"]),
            "dropped_tokens": int(metrics["dropped_tokens"]),
        }
        run.metrics.write(line)
        run.display.log(line)


def _evaluate_some(run: Run) -> Evaluation:
    return _evaluate(run, run.heldout.spread(run.config.train.eval_sequences), interruptible=False)


def _evaluate(run: Run, rows: list[int], *, interruptible: bool) -> Evaluation:
    result = evaluate(
        lambda batch: run.score(run.state, run.place(batch)),
        run.heldout,
        rows,
        batch_size=run.rows_per_pass,
        interrupted=lambda: interruptible and run.stop.exit_code is not None,
    )
    if result is None:
        raise SystemExit(run.stop.exit_code)
    return result


def _log_evaluation(run: Run, result: Evaluation) -> None:
    line = {
        "step": run.step,
        "tokens": schedule.tokens_before(run.config, run.step),
        "eval_loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
    }
    run.metrics.write(line)
    run.display.say(f"held-out after step {run.step}: loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte")


def _save(run: Run) -> None:
    record = {
        "step": run.step,
        "tokens": schedule.tokens_before(run.config, run.step),
        "progress": schedule.progress(run.config, run.step),
        "data": run.loader.state(),
        "seconds": run.seconds,
        "config_hash": settings.content_hash(run.config),
        "versions": workdir.versions(),
    }
    run.checkpoints.save(run.step, run.state, record)


def _draw(run: Run, metrics: dict[str, jax.Array]) -> None:
    """Draws the experts' load, before the last checkpoint makes the last step a thing of the past."""
    if "expert_load" in metrics:
        load_LE = np.asarray(metrics["expert_load"])
        plots.draw_expert_load(run.folder / "expert_load.png", run.metrics.lines(), load_LE, run.config.name)


def _finish(run: Run) -> dict[str, Any]:
    """Evaluates on all held-out text, writes a sample, draws the loss and writes summary.json."""
    run.stop.defer()
    run.display.stop()
    run.checkpoints.wait()
    run.display.say(f"scoring all {len(run.heldout):,} held-out sequences")
    result = _evaluate(run, list(range(len(run.heldout))), interruptible=True)
    if run.metrics.lines()[-1].get("eval_loss") is None:
        _log_evaluation(run, result)
    lines = run.metrics.lines()
    plots.draw_loss(run.folder / "loss.png", lines, run.config.name)
    logged = [line for line in lines if "loss" in line]
    rates = run.meter.whole()
    summary = {
        "name": run.config.name,
        "steps": run.step,
        "tokens": schedule.tokens_before(run.config, run.step),
        "loss": logged[-1]["loss"],
        "mtp_loss": logged[-1]["mtp_loss"],
        "eval_loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        **compressed_bits_per_byte(text for _, text in run.corpus.heldout_texts()),
        "max_violation_first": logged[0]["max_violation"],
        "max_violation_last": logged[-1]["max_violation"],
        "dropped_tokens": max(line["dropped_tokens"] for line in logged),
        "wall_seconds": run.seconds,
        "compile_seconds": run.train_step.seconds + run.score.seconds,
        "median_step_seconds": rates and rates.step_seconds,
        "tokens_per_second": rates and rates.tokens_per_second,
        "mfu": rates and rates.mfu,
        "peak": run.peak.source,
        "sample": _sample(run),
    }
    workdir.write_json(run.folder / "summary.json", summary)
    return summary


def _sample(run: Run) -> dict[str, str] | None:
    """Lets the model continue the beginning of the first held-out document."""
    n_tokens = run.config.train.sample_tokens
    if not n_tokens:
        return None
    tokenizer = run.corpus.tokenizer
    prompt = [tokenizer.special.bos, *run.corpus.heldout[0][:_PROMPT_TOKENS].tolist()]
    completion = complete(
        restored_model(run.config, run.state),
        prompt,
        n_tokens=n_tokens,
        window=min(run.config.data.sequence_length, len(prompt) + n_tokens),
        seed=run.config.train.seed,
        temperature=0.7,
        top_p=0.95,
    )
    return {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(completion)}

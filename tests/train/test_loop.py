"""The loop with a state, a step and a source that have nothing to do with pre-training."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dsjax.config import TrainConfig
from dsjax.parallel.compilation import Compiled
from dsjax.parallel.mesh import make_mesh
from dsjax.signals import StopRequest
from dsjax.train import loop, session
from dsjax.train.source import Taken
from dsjax.train.throughput import TIMED


@dataclasses.dataclass(frozen=True)
class Group:
    prompts: int = 4


@dataclasses.dataclass(frozen=True)
class Root:
    """A root config that shares `train` with pre-training and has a group of its own."""

    name: str
    train: TrainConfig
    rl: Group = Group()


CONFIG = Root(
    "toy",
    TrainConfig(
        steps=6,
        batch_size=4,
        log_every=1,
        eval_every=2,
        checkpoint_every=3,
        keep=9,
        tensorboard=False,
    ),
)


class Rollouts:
    """Questions whose answers are made from the weights that it is handed."""

    def __init__(self, mesh):
        self.identity = {"questions": "q"}
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._next, self.closed = 0, False

    def take(self, n, state):
        answers = np.asarray(state["w"]) + np.arange(self._next, self._next + n, dtype=np.float32)
        first, self._next = self._next, self._next + n
        batch = {"answers": jax.device_put(answers, self._sharding)}
        reward = float(answers.mean())
        return Taken(batch, 10 * n + first, range(first, first + n), {"reward": reward})

    def state(self):
        return {"next": self._next}

    def restore(self, record):
        self._next = record["next"]

    def close(self):
        self.closed = True


def step(state, batch, knobs):
    gap = batch["answers"] - state["w"]
    metrics = {
        "loss": (gap**2).mean(),
        "grad_norm": jnp.abs(gap.mean()),
        "clipped": (gap > 2).sum(),
        "expert_load": gap[None],
        "skipped": jnp.bool_(False),
    }
    return {"w": state["w"] + knobs["learning_rate"] * gap.mean()}, metrics


def train(folder, config=CONFIG, *, measured=("eval_reward",)):
    """Returns the exit code, what the console showed, and what `evaluate` saw."""
    output, seen = io.StringIO(), {"eval": [], "w": None}

    def recipe(run):
        mesh = make_mesh({"data": 1}, n_devices=1)
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        new = {"w": jax.device_put(jnp.float32(1), everywhere)}
        abstract = {"w": jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)}
        source = Rollouts(mesh)
        run.begin(source, abstract, lambda: new, mesh=mesh, flops_per_token=1.0)

        def evaluate():
            seen["eval"].append(run.step)
            return dict.fromkeys(measured, float(run.state["w"]))

        loop.run_steps(
            run,
            Compiled(jax.jit(step, donate_argnums=0), mesh),
            batch_size=lambda index: config.rl.prompts,
            knobs=lambda index: {"learning_rate": 0.5 / (index + 1)},
            evaluate=evaluate,
        )
        seen["w"] = float(run.state["w"])
        if not run.exit_code:
            run.finish({"reward": seen["w"], "worst": float("nan")}, compile_seconds=0.0)

    console = Console(file=output, width=150)
    code = session.run(config, folder, recipe, command="again", console=console)
    return code, output.getvalue(), seen


def lines(folder):
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMED} for line in metrics]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, *train(folder)


def test_any_objective_and_source_can_use_the_loop(finished):
    folder, code, output, seen = finished
    assert code == 0
    assert seen["eval"] == [2, 4]
    weight, tokens, want, loads = np.float32(1), 0, [], []
    for index in range(6):
        answers = weight + np.arange(4 * index, 4 * index + 4, dtype=np.float32)
        gap, rate = answers - weight, 0.5 / (index + 1)
        tokens += 40 + 4 * index
        want.append((index + 1, tokens, float(answers.mean()), rate, int((gap > 2).sum())))
        loads.append(gap)
        weight += np.float32(rate) * gap.mean()
    logged = [line for line in lines(folder) if "loss" in line]
    keys = ("step", "tokens", "reward", "learning_rate", "clipped")
    np.testing.assert_allclose([[line[key] for key in keys] for line in logged], want, rtol=1e-6)
    assert set(logged[0]) == {*keys, "loss", "grad_norm", "skipped_steps"}
    assert isinstance(logged[0]["clipped"], int)
    assert "held-out after step 2: eval_reward" in output and "reward 2.500" in output
    summary = json.loads((folder / "summary.json").read_text())
    np.testing.assert_allclose(summary["reward"], weight, rtol=1e-6)
    assert summary["worst"] is None  # it was NaN, which JSON has not
    with np.load(folder / "expert_load.npz") as load:  # of the steps after the checkpoint of step 3
        np.testing.assert_allclose(load["load_LE"], [np.mean(loads[3:], axis=0)], rtol=1e-6)
        assert (load["steps"], load["last_step"]) == (3, 6)
    assert (folder / "expert_load.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("asked", [1, 2, 4])
def test_stopped_run_resumes_with_the_same_numbers(finished, tmp_path, monkeypatch, asked):
    calls = []

    def exit_code(request):
        calls.append(request)
        return 143 if len(calls) > 2 * asked else None

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "exit_code", property(exit_code))
        code, output, _ = train(tmp_path)
    assert code == 143 and "to resume: again" in output
    assert not (tmp_path / "summary.json").exists()
    code, output, seen = train(tmp_path)
    assert code == 0 and f"resuming {tmp_path} after step" in output.replace("\n", "")
    assert lines(tmp_path) == lines(finished[0]) and seen["w"] == finished[3]["w"]


def test_finished_run_does_nothing_and_other_data_is_refused(finished, tmp_path):
    code, output, seen = train(finished[0])
    assert code == 0 and "is finished" in output and seen["w"] is None
    with pytest.raises(ValueError, match=r"rl\.prompts was 4 and is now 8"):
        train(finished[0], dataclasses.replace(CONFIG, rl=Group(8)))


def test_nothing_is_written_of_an_evaluation_without_numbers(tmp_path):
    code, output, seen = train(tmp_path, measured=())
    assert code == 0 and seen["eval"] == [2, 4]
    assert "held-out" not in output and all("loss" in line for line in lines(tmp_path))


def test_source_is_closed_when_a_step_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(Rollouts, "close", lambda source: closed.append(source))
    monkeypatch.setattr(loop, "described", lambda numbers: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path)
    assert len(closed) == 1

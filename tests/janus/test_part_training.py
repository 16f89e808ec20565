"""A part that trains by itself is read back; a stopped run goes on as if it had not been."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from dsjax.config import OptimConfig
from dsjax.config.janus import VqTraining
from dsjax.config.posttraining import TuningConfig
from dsjax.config.vision import VqConfig
from dsjax.janus import part_training
from dsjax.model.layers import Constant, declare
from dsjax.model.parameters import initialize
from dsjax.train.step import TrainState

CONFIG = VqTraining(
    name="part",
    vq=VqConfig(),
    size=32,
    train=TuningConfig(
        steps=4, batch_size=2, log_every=1, eval_every=0, checkpoint_every=2, tensorboard=False
    ),
    optim=OptimConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.0),
)


class Line(nnx.Module):
    def __init__(self):
        self.slope = declare((3,), ("norm",), Constant(1.0))


class Numbers:
    @property
    def identity(self):
        return {"of": "a test"}

    def epochs(self, row):
        return row / 8

    def __getitem__(self, row):
        return {"x": np.full(3, row, np.float32)}


def step(declared, optimizer):
    structure, _ = nnx.split(declared, nnx.Param)

    def run(state, batch, knobs):
        def loss(params):
            slope = nnx.merge(structure, params).slope[...]
            return jnp.square(slope[None] * batch["x"][0] - 7.0).mean()

        total, grads = jax.value_and_grad(loss)(state.params)
        params, moments, norm = optimizer.update(
            grads, state.optimizer, state.params, knobs["learning_rate"], jnp.isfinite(total)
        )
        metrics = {"loss": total, "other": total, "grad_norm": norm, "skipped": jnp.bool_(False)}
        return TrainState(params, state.router, moments), metrics

    return run


@pytest.fixture
def train(tmp_path):
    declared = Line()

    def train(name, steps):
        config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=steps))
        code = part_training.train(
            config,
            declared,
            Numbers(),
            tmp_path / name,
            step=lambda optimizer: step(declared, optimizer),
            begin=lambda: initialize(declared, jax.random.key(0)),
            reports=lambda last: {"loss": last["loss"]},
            command="x",
            console=Console(file=io.StringIO()),
        )
        assert code == 0
        return np.asarray(part_training.trained(config, declared, tmp_path / name).slope[...])

    return train


def test_a_stopped_run_goes_on_as_if_it_had_not_been(train, tmp_path):
    at_once, half = train("at_once", 4), train("stopped", 2)
    assert 1 < half.min() and (half < at_once).all()
    np.testing.assert_array_equal(train("stopped", 4), at_once)
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    lines = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert summary["loss"] == json.loads(lines[-1])["loss"] and "other" not in summary

"""A training step on eight devices is that of one: what a model sees, reads and draws is laid out
over `data`, `fsdp` and `tensor`, and the sums of a micro-batch are over all of them. Kinds have
fewer rows here than there are parts of a batch. (The compiler's own gradient of a depthwise kernel,
twice too large, showed only in such a step.)
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dsjax.data.packing import stack
from dsjax.janus import training
from dsjax.janus.objective import seeing_and_drawing
from dsjax.parallel.mesh import make_mesh
from dsjax.train.batches import place_all
from dsjax.train.optimizer import Optimizer, adamw
from dsjax.train.step import abstract_state, compile_step, train_step
from tests.closeness import LOGITS, assert_close
from tests.janus import toy

AXES = {"data": 2, "fsdp": 2, "tensor": 2}
RATE = 100.0  # so that a gradient is not lost in the rounding of what it is subtracted from


def descent(trains):
    """An optimizer whose steps are the gradients, so that a step shows them."""
    split = adamw(toy.OptimConfig(), trains).split

    def update(grads, state, params, learning_rate, fine=True):
        del fine
        trained, frozen = split(params)
        moved = jax.tree.map(lambda one, grad: one - learning_rate * grad, trained, grads)
        return nnx.merge_state(moved, frozen), state, jax.numpy.float32(1)

    return Optimizer(split, lambda params: (), update)


def stepped(config, checkpoint, form, data, axes):
    """Returns the parameters before and after a step over two micro-batches, and its metrics."""
    n_devices = int(np.prod(list(axes.values())))
    mesh = make_mesh(axes, n_devices=n_devices)
    declared = training.declared_sighted(config, form.vision)
    optimizer = descent(training.trained_parts(config.janus.trains))
    abstract = abstract_state(declared, optimizer, mesh)
    first = training.first_state(config, checkpoint, declared, optimizer, abstract, mesh)
    before = jax.tree.map(np.asarray, first.params)
    step = train_step(declared, optimizer, seeing_and_drawing(config, form.rules))
    rows = stack([data.training[number] for number in range(8)])
    batch = {name: array.reshape(2, 4, *array.shape[1:]) for name, array in rows.items()}
    placed = place_all(batch, mesh)
    knobs = {"learning_rate": np.float32(RATE), "bias_update_speed": np.float32(0)}
    compiled = compile_step(step, abstract, mesh)
    state, metrics = compiled(first, placed, knobs)
    return before, jax.tree.map(np.asarray, state.params), jax.tree.map(float, metrics)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["codes", "flow"])
def test_step_on_eight_devices_is_that_of_one(kind, tmp_path, monkeypatch):
    config = toy.write_flow(tmp_path, monkeypatch) if kind == "flow" else toy.write(tmp_path)
    own = {"align": 1.0, "align_layer": 1} if kind == "flow" else {}
    own |= {"trains": ("language", "tower", "aligner", "drawing")}
    config = toy.change(config, janus=own)
    checkpoint, form = training.open_initial(config)
    config = dataclasses.replace(config, model=checkpoint.model)
    data = training.read_data(config, checkpoint, form, lambda text: None)
    opened = (config, checkpoint, form, data)
    before, want, metrics = stepped(*opened, {"data": 1})
    _, found, others = stepped(*opened, AXES)
    assert metrics.keys() == others.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-5, err_msg=name)
    paths = [path for path, _ in nnx.to_flat_state(want)]
    n_moved = 0
    for path, old, one, other in zip(
        paths, *map(jax.tree.leaves, (before, want, found)), strict=True
    ):
        n_moved += bool(np.any(one != old))
        assert_close(other - old, one - old, LOGITS, f"gradient of {path}")
    assert n_moved > len([path for path in paths if "vq" not in path]) / 2

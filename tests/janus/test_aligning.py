"""What an inner layer makes of a drawing, aligned with what the tower sees of the picture: the loss
against NumPy, layer by layer, and what has a gradient of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config.janus import JanusConfig
from dsjax.data.packing import stack
from dsjax.janus import training
from dsjax.janus.encodings import square_of
from dsjax.janus.objective import seeing_and_drawing
from dsjax.parallel.mesh import make_mesh
from dsjax.train.evaluate import _read, batch_sums
from dsjax.train.objective import replacing
from dsjax.train.optimizer import adamw
from dsjax.train.step import abstract_state
from dsjax.vision import pictures
from tests.janus import toy

WEIGHT = 0.5


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A small JanusFlow that aligns its first layer of two, with biases that are not 0."""
    with pytest.MonkeyPatch.context() as patch:
        config = toy.write_flow(tmp_path_factory.mktemp("flow"), patch)
        config = toy.change(config, janus={"align": WEIGHT, "align_layer": 1})
        checkpoint, form = training.open_initial(config)
        config = dataclasses.replace(config, model=checkpoint.model)
        data = training.read_data(config, checkpoint, form, lambda text: None)
        declared = training.declared_sighted(config, form.vision)
        optimizer = adamw(config.optim, training.trained_parts(config.janus.trains))
        mesh = make_mesh({"data": 1}, n_devices=1)
        abstract = abstract_state(declared, optimizer, mesh)
        state = training.first_state(config, checkpoint, declared, optimizer, abstract, mesh)
        rng = np.random.default_rng(0)
        for layer in state.params["alignment"]["layers"].values():
            layer["bias"].set_value(jnp.float32(rng.normal(size=layer["bias"].get_value().shape)))
        yield config, form, data, declared, state


def batch_of(data):
    return stack([data.training[number] for number in range(4)])  # two that see, one of text


def by_hand(data, layers, hidden_TD, seen_XTD, row):
    """The sum of negative cosines in float64, and how many drawings a row has.

    Args:
      hidden_TD: what the row's positions are after the layer.
      seen_XTD: what the tower sees of each picture, read anew.
    """
    latents = data.training._parts[2]._examples.latents
    total, n_drawn = 0.0, 0
    for number, start in enumerate(row["starts"]):
        if start < 0:
            continue
        own = row["latents"][number]
        (example,) = [each for each in range(len(latents)) if np.array_equal(latents[each], own)]
        seen_TD = np.asarray(seen_XTD[example], np.float64)
        x_TD = np.asarray(hidden_TD[start + 1 : start + 1 + len(seen_TD)], np.float64)
        for place, layer in sorted(layers.items()):
            if place:
                x_TD = x_TD / (1 + np.exp(-x_TD))
            weight, bias = (layer[name].get_value() for name in ("weight", "bias"))
            x_TD = x_TD @ np.asarray(weight, np.float64) + np.asarray(bias, np.float64)
        lengths = np.linalg.norm(x_TD, axis=1) * np.linalg.norm(seen_TD, axis=1)
        total -= ((x_TD * seen_TD).sum(axis=1) / lengths).sum()
        n_drawn += 1
    return total, n_drawn


def test_loss_is_the_negative_cosine_by_hand(opened):
    config, form, data, declared, state = opened
    objective = seeing_and_drawing(config, form.rules)
    batch, shown = batch_of(data), data.training._parts[2]._examples.pictures
    squares = np.stack([square_of(each, form.vision.tower.image_size) for each in shown])

    @jax.jit
    def run(state, batch, pixels):
        model, inputs, targets = _read(declared, objective, state, batch)
        x_BTD = model._embed(inputs.tokens, replacing(objective, model, targets))
        block = jax.tree.map(lambda stacked: stacked[0], model.dense_layers)
        hidden_BTD, _ = block(x_BTD, model.context(inputs), None)
        sums = batch_sums(declared, objective)(state, batch, {})
        return sums, hidden_BTD, model.eyes.tower(pixels)

    found, hidden_BTD, seen_XTD = run(state, batch, pictures.normalized(squares, form.rules))
    layers = state.params["alignment"]["layers"]
    row = {name: batch[name][3] for name in ("starts", "latents")}
    want, n_drawn = by_hand(data, layers, hidden_BTD[3], seen_XTD, row)
    assert n_drawn > 1
    np.testing.assert_allclose(found["align"], want, rtol=1e-4)
    # The metrics: a mean of its own, and weighted in the loss.
    metrics = objective.metrics(found)
    n_positions = form.vision.code_grid**2 * n_drawn
    np.testing.assert_allclose(metrics["align_loss"], want / n_positions, rtol=1e-4)
    assert 0.01 < abs(metrics["align_loss"]) < 1
    kinds = ("see", "text", "draw")
    total = sum(float(found[kind]) for kind in kinds) + WEIGHT * want
    n = sum(float(found[f"{kind}_targets"]) for kind in kinds)
    np.testing.assert_allclose(metrics["loss"], total / n, rtol=1e-4)


def test_gradient_reaches_what_is_below_the_layer_and_not_the_tower(opened):
    """Nor what is above the layer, nor what draws afterwards."""
    config, form, data, declared, state = opened
    everything = toy.change(config, janus={"trains": ("language", "tower", "aligner", "drawing")})
    sums = batch_sums(declared, seeing_and_drawing(everything, form.rules))
    batch = batch_of(data)

    def loss(params):
        return sums(dataclasses.replace(state, params=params, optimizer=None), batch, {})["align"]

    grads = jax.jit(jax.grad(loss))(state.params)
    moved = {
        ".".join(map(str, path)): np.abs(np.asarray(variable.get_value()))
        for path, variable in nnx.to_flat_state(grads)
    }
    assert all(np.isfinite(each).all() for each in moved.values())
    for name, gradient in moved.items():
        inner = name.startswith("dense_layers.")
        if inner:
            assert gradient[1].max() == 0, name
            gradient = gradient[0]
        below = name.startswith(("alignment.", "eyes.brush.encoder", "embed.")) or inner
        assert (gradient.max() > 0) == below, name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"align": -1.0}, r"janus.align=-1.0 must not be negative"),
        ({"align": 1.0, "align_layer": 0}, r"janus.align_layer=0 must be greater than 0"),
        ({"align": 1.0, "ratio": (1, 1, 0)}, r"has none; set janus.align=0"),
        (
            {"alignment": "a"},
            r"janus.alignment=a is read where janus.align is above",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        JanusConfig(**keys)


def test_models_that_cannot_be_aligned_are_refused(opened, tmp_path):
    config, *_ = opened
    with pytest.raises(ValueError, match=r"layer=3 is not one of the language model's 2 layers"):
        toy.change(config, janus={"align_layer": 3})
    with pytest.raises(ValueError, match=r"alignment=nowhere is not a file; name alignment.safe"):
        training.open_initial(toy.change(config, janus={"alignment": "nowhere"}))
    codes = toy.write(tmp_path)
    with pytest.raises(ValueError, match=r"janus.align=1.0 is for JanusFlow, and .* is not one"):
        training.open_initial(toy.change(codes, janus={"align": 1.0}))

"""The toy is made in few steps, goes on where it was stopped, and says what it measured."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.load import open_checkpoint
from dsjax.infer.looking import open_format
from dsjax.janus import contrasting, from_nothing, shapes, training
from dsjax.model.parameters import initialize
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes


@pytest.fixture(scope="module")
def short():
    """The config with a step or two of everything."""

    def cut(own, steps):
        return dataclasses.replace(own, train=dataclasses.replace(own.train, steps=steps))

    config = from_nothing.load_config("configs/pipelines/shapes_tiny.py", seed=5)
    (stage,) = [stage for stage in config.stages if stage.name == "unified"]
    return dataclasses.replace(
        config,
        autoencoder=cut(config.autoencoder, 1),
        tokenizer=cut(config.tokenizer, 2),
        tower=cut(config.tower, 1),
        stages=(dataclasses.replace(stage, config=cut(stage.config, 2)),),
        n_held_out=8000,
        n_drawings=3,
        guidances=(2.0,),
    )


def test_seed_is_that_of_data_and_of_every_run(short):
    seeds = {own.train.seed for own in (short.autoencoder, short.tokenizer, short.tower)}
    seeds |= {stage.config.train.seed for stage in short.stages}
    seeds |= {stage.config.janus.seed for stage in short.stages}
    assert seeds | {short.seed} == {5}


def test_random_weights_are_as_wide_as_their_inputs_ask(short):
    eyes = initialize(Eyes(short.vision, Policy(jnp.dtype("float32"))), jax.random.key(0))
    found = from_nothing.widened(eyes)
    for weight, n_inputs in (
        (found.tower.patch, 16 * 16 * 3),
        (found.tower.layers.attn.wqkv, 128),
        (found.tower.layers.fc2.weight, 384),
        (found.aligner.layers[0].weight, 128),
        (found.pencil.head.project.weight, 128),
    ):
        assert float(weight[...].std()) == pytest.approx(n_inputs**-0.5, rel=0.1)
    for same in ("vq", "embed"):
        before, after = getattr(eyes.pencil, same), getattr(found.pencil, same)
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        assert all(bool((one == other).all()) for one, other in pairs)


@pytest.mark.slow
def test_toy_is_made_and_made_once(short, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_mesh", functools.partial(make_mesh, n_devices=1))
    monkeypatch.setattr(shapes, "EVERY", shapes.EVERY[:4])
    monkeypatch.setattr(shapes, "_N_CROWDS", 8)
    train = dataclasses.replace(short.tower.train, batch_size=4)  # as many as captions
    tower = dataclasses.replace(short.tower, train=train)
    short = dataclasses.replace(short, n_held_out=8, tower=tower)

    def run():
        out = io.StringIO()
        console = Console(file=out, width=200)
        code = from_nothing.run(short, tmp_path / "toy", command="again", console=console)
        return code, out.getvalue()

    code, said = run()
    assert code == 0 and "naming 8 held-out pictures" in said and "drawing 3 pictures" in said
    report = json.loads((tmp_path / "toy" / "shapes.json").read_text())
    assert report["drawings"].keys() == {"2"}
    assert all(0 <= share["value"] <= 1 for share in report["drawings"]["2"].values())
    with PIL.Image.open(tmp_path / "toy" / "drawn.png") as sheet:
        assert sheet.size == (2 * 56 - 8, 2 * 56 - 8)  # of three pictures
    start = load_eyes(open_checkpoint(tmp_path / "toy" / "start"), dtype=np.float32)
    learned = contrasting.trained(short.tower, tmp_path / "toy" / "tower")
    same = jax.tree.map(lambda one, other: bool((one == other).all()), start.tower, learned)
    assert all(jax.tree.leaves(same))
    form = open_format(open_checkpoint(tmp_path / "toy" / "unified" / "model"))
    assert form is not None and form.vision == short.vision
    code, said = run()
    assert code == 0 and "naming" not in said and "compil" not in said
    other = dataclasses.replace(short, n_drawings=4)
    with pytest.raises(ValueError, match="holds a toy of other settings"):
        from_nothing.run(other, tmp_path / "toy", command="again", console=Console(quiet=True))

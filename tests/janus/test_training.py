"""Whole runs of a small Janus: which weights move, that they resume to the bit, what they write."""

import dataclasses
import functools
import io
import json
import shutil

import pytest
from rich.console import Console

from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.hf_folder import open_hf
from dsjax.checkpoint.load import load
from dsjax.generate.codes import Drawer
from dsjax.generate.sampling import Sampling
from dsjax.infer import drawing
from dsjax.janus import training
from dsjax.parallel.mesh import make_mesh
from tests.janus import toy


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", functools.partial(make_mesh, n_devices=1))
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("janus"))


def change(config, **groups):
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **keys)
            for name, keys in groups.items()
        },
    )


def run(config, folder):
    out = io.StringIO()
    code = training.train(config, folder, command="again", console=Console(file=out, width=200))
    return code, out.getvalue()


def tensors(folder):
    files = open_hf(folder).files
    return {name: files.read(name) for name in files.tensors}


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    everything = change(small, janus={"trains": ("language", "tower", "aligner", "drawing")})
    assert run(everything, folder)[0] == 0
    return everything, folder


OF_PART = {
    "language": ("model.language_model.", "lm_head."),
    "tower": ("model.vision_model.",),
    "aligner": ("model.aligner.",),
    "drawing": (
        "model.generation_embeddings.", "model.generation_aligner.", "model.generation_head.",
    ),
    "nothing": ("model.vqmodel.",),
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize(
    "trains", [("aligner", "drawing"), ("language",), ("tower", "aligner", "drawing", "language")]
)
def test_what_is_frozen_keeps_its_bytes_and_what_trains_moves(trains, small, whole, tmp_path):
    if len(trains) == 4:
        folder = whole[1]
    else:
        folder = tmp_path / "run"
        steps = {"steps": 1, "checkpoint_every": 0}
        assert run(change(small, janus={"trains": trains}, train=steps), folder)[0] == 0
    before, after = tensors(training.Path(small.init)), tensors(folder / "model")
    assert before.keys() == after.keys()
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    for part, prefixes in OF_PART.items():
        own = {name for name in before if name.startswith(prefixes)}
        assert own, part
        if part in trains:
            assert own <= moved, sorted(own - moved)
        else:
            assert not own & moved, sorted(own & moved)


@pytest.mark.heavy
def test_resumed_run_is_the_same_to_the_bit(whole, tmp_path):
    config, folder = whole
    stopped = tmp_path / "run"
    shutil.copytree(folder, stopped)
    for left in ("checkpoints/4", "model"):
        shutil.rmtree(stopped / left)
    (stopped / "summary.json").unlink()
    code, said = run(config, stopped)
    assert code == 0 and "after step 2 of 4" in said
    want, found = tensors(folder / "model"), tensors(stopped / "model")
    assert all(want[name].tobytes() == found[name].tobytes() for name in want)
    lines = [
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (folder, stopped)
    ]
    losses = [[each["loss"] for each in some if "loss" in each] for some in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.heavy
def test_run_says_what_each_kind_costs_and_its_model_is_a_folder_to_draw_with(whole):
    config, folder = whole
    summary = json.loads((folder / "summary.json").read_text())
    for kind in ("see", "text", "draw"):
        assert 0 < summary[f"eval_{kind}_loss"] < 8 and 0 < summary[f"{kind}_loss"] < 8
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert summary["loss"] < first["loss"]
    made = dataclasses.replace(config, init=str(folder / "model"))
    checkpoint, form = training.open_initial(made)
    prompt = drawing.encode(checkpoint, form, "noise")
    drawer = Drawer(load(checkpoint), load_eyes(checkpoint).pencil, form.vision.code_grid)
    blank = drawing.blanked(form, prompt)
    codes = drawer.codes(prompt, blank, [Sampling(seed=0)], guidance=2.0)
    assert drawer.pixels(codes).shape == (1, 4, 4, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"see": ""}, r"janus.ratio=\(2, 1, 1\) asks for rows that see, and janus.see is empty"),
        ({"sequence_length": 100}, r"none of the 9 examples of janus.see has room in a row"),
    ],
)
def test_wrong_data_is_refused_before_the_folder_is_touched(small, keys, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(change(small, janus=keys), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "message"), [("high", "two towers"), ("tiles", "tiles"), ("flow", "a flow")]
)
def test_models_that_see_or_draw_in_another_way_are_refused(small, part, message, monkeypatch):
    form = training.open_initial(small)[1]
    vision = dataclasses.replace(form.vision)
    object.__setattr__(vision, part, object())
    other = dataclasses.replace(form, vision=vision)
    monkeypatch.setattr(training, "open_format", lambda checkpoint: other)
    with pytest.raises(ValueError, match=f"is a model with {message}"):
        training.open_initial(small)

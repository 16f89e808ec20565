"""Whole runs of a small Janus: which weights move, that they resume to the bit, what they write."""

import dataclasses
import functools
import io
import json
import shutil

import pytest
from rich.console import Console

from dsjax.checkpoint.alignment import FILE
from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.hf_folder import open_hf
from dsjax.checkpoint.load import load, open_checkpoint
from dsjax.checkpoint.slices import read_slice
from dsjax.checkpoint.vae import load_vae, open_vae
from dsjax.checkpoint.weights import Weights
from dsjax.generate.codes import Drawer
from dsjax.generate.flow import Painter
from dsjax.generate.sampling import Sampling
from dsjax.infer import drawing
from dsjax.janus import training
from dsjax.parallel.mesh import make_mesh
from tests.janus import toy
from tests.janus.toy import change


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", functools.partial(make_mesh, n_devices=1))
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("janus"))


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


@pytest.mark.heavy
def test_a_run_is_not_the_model_that_it_trains(whole):
    _, folder = whole
    with pytest.raises(ValueError, match=r"what it trains is .*whole/model; name that$"):
        open_checkpoint(folder)
    assert open_checkpoint(folder / "model").hf is not None


OF_PART = {
    "language": ("model.language_model.", "lm_head."),
    "tower": ("model.vision_model.",),
    "aligner": ("model.aligner.",),
    "drawing": (
        "model.generation_embeddings.", "model.generation_aligner.", "model.generation_head.",
    ),
    "nothing": ("model.vqmodel.",),
}  # fmt: skip
OF_FLOW = {
    "language": ("language_model.",),
    "tower": ("vision_und_enc_model.vision_tower.",),
    "aligner": ("vision_und_enc_aligner.", "beg_of_und_embed"),
    "drawing": ("vision_gen_enc", "vision_gen_dec"),
    "nothing": ("vision_und_enc_model.vision_tower.attn_pool.",),
}


def check_moved(parts, trains, init, folder):
    """Checks that what trains has moved, all of it, and that all else has kept its bytes."""
    before, after = tensors(training.Path(init)), tensors(folder / "model")
    assert before.keys() == after.keys()
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    left = set(before)
    for part, prefixes in reversed(parts.items()):
        own = {name for name in left if name.startswith(prefixes)}
        left -= own
        assert own, part
        if part in trains:
            assert own <= moved, sorted(own - moved)
        else:
            assert not own & moved, sorted(own & moved)
    assert not left, sorted(left)


def check_resumed(config, folder, stopped):
    """Checks that a run taken up after 2 of 4 steps ends as the one that was not stopped."""
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
    check_moved(OF_PART, trains, small.init, folder)


@pytest.mark.heavy
def test_resumed_run_is_the_same_to_the_bit(whole, tmp_path):
    check_resumed(*whole, tmp_path / "run")


@pytest.mark.heavy
def test_resumed_run_says_what_it_needs_of_the_folder_that_it_began_with(whole, tmp_path):
    config, folder = whole
    gone = dataclasses.replace(config, init=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"gone does not exist.* the layout of model/ from"):
        run(gone, folder)
    with pytest.raises(ValueError, match=r"gone does not exist; name the folder of a checkpoint$"):
        run(gone, tmp_path / "new")


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


def test_tokens_of_a_run_are_those_of_its_batch_ramp(small, tmp_path, monkeypatch):
    """Two steps of 4 rows of 500 tokens, and two of 8."""
    out = io.StringIO()
    console = Console(file=out, width=200)
    monkeypatch.setattr(training.loop, "run_steps", lambda *_, **__: 1 / 0)
    ramped = change(small, train={"batch_size_start": 4, "batch_ramp_fraction": 0.5})
    with pytest.raises(ZeroDivisionError):
        training.train(ramped, tmp_path / "run", command="again", console=console)
    assert "4 steps, 12,000 tokens" in out.getvalue()


@pytest.fixture(scope="module")
def flowing(tmp_path_factory):
    """A small JanusFlow, and a run of it as the paper's: everything trains, drawings are aligned,
    weights are averaged.
    """
    with pytest.MonkeyPatch.context() as patch:
        config = toy.write_flow(tmp_path_factory.mktemp("flow"), patch)
        own = {"trains": ("language", "tower", "aligner", "drawing"), "align": 1.0}
        everything = change(config, janus=own | {"align_layer": 1}, optim={"ema": 0.5})
        folder = tmp_path_factory.mktemp("runs") / "flow"
        assert run(everything, folder)[0] == 0
        yield everything, folder


@pytest.mark.heavy
@pytest.mark.parametrize(
    "trains", [("aligner", "drawing"), ("tower", "aligner", "drawing", "language")]
)
def test_stages_of_a_flow_train_what_they_say(trains, flowing, tmp_path):
    config, folder = flowing
    if len(trains) == 2:
        folder = tmp_path / "run"
        steps = {"steps": 1, "checkpoint_every": 0}
        plain = change(config, janus={"trains": trains, "align": 0.0}, optim={"ema": 0.0})
        assert run(change(plain, train=steps), folder)[0] == 0
        assert not (folder / FILE).exists()
    check_moved(OF_FLOW, trains, config.init, folder)


@pytest.mark.heavy
def test_resumed_flow_is_the_same_to_the_bit(flowing, tmp_path):
    """Noise, times and latents included, and what is written are averages."""
    check_resumed(*flowing, tmp_path / "run")
    files = [(folder / FILE).read_bytes() for folder in (flowing[1], tmp_path / "run")]
    assert files[0] == files[1]


@pytest.mark.heavy
def test_what_is_written_of_a_flow_is_the_average_and_the_next_stage_goes_on_with_it(
    flowing, tmp_path
):
    config, folder = flowing
    state = Weights(folder / "checkpoints" / "4" / "state")
    written = tensors(folder / "model")["language_model.lm_head.weight"]
    weights, average = (
        read_slice(state.tensors((*root, "head", "weight")), (slice(None),) * 2, written.dtype)
        for root in (("params",), ("optimizer", "ema"))
    )
    assert written.T.tobytes() == average.tobytes() != weights.tobytes()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["align_loss"] for line in lines if "align_loss" in line]
    assert losses[-1] < losses[0] and "eval_align_loss" in lines[-1]
    # A stage that hardly moves anything writes what it began with.
    own = {"alignment": str(folder / FILE)}
    still = change(config, janus=own, train={"steps": 1}, optim={"learning_rate": 1e-30})
    still = dataclasses.replace(still, init=str(folder / "model"))
    assert run(still, tmp_path / "next")[0] == 0
    assert (tmp_path / "next" / FILE).read_bytes() == (folder / FILE).read_bytes()
    assert tensors(tmp_path / "next" / "model")["language_model.lm_head.weight"].tobytes() == (
        written.tobytes()
    )


@pytest.mark.heavy
def test_flow_learns_and_its_model_is_a_folder_to_draw_with(flowing):
    config, folder = flowing
    summary = json.loads((folder / "summary.json").read_text())
    for kind in ("see", "text", "draw"):
        assert 0 < summary[f"eval_{kind}_loss"] and 0 < summary[f"{kind}_loss"]
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert summary["loss"] < first["loss"]
    made = dataclasses.replace(config, init=str(folder / "model"))
    checkpoint, form = training.open_initial(made)
    vae = load_vae(open_vae(training.Path(config.janus.vae)))
    painter = Painter(load(checkpoint), load_eyes(checkpoint).brush, vae, form.vision.code_grid)
    prompt = drawing.encode(checkpoint, form, "noise")
    latents = painter.latents(prompt, painter.noise([0]), guidance=2.0, steps=2)
    assert painter.pixels(latents).shape == (1, 8, 8, 3)


def test_a_flow_needs_a_vae_and_codes_need_none(small, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"janus.vae=vae is for JanusFlow, and .* is not one"):
        training.open_initial(change(small, janus={"vae": "vae"}))
    config = toy.write_flow(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"of stabilityai/sdxl-vae, and set janus.vae=FOLDER"):
        training.open_initial(change(config, janus={"vae": ""}))

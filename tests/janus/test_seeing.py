"""Models that see and do not draw: the loss of packed rows is that of every answer alone, after the
prompt and the embeddings that inference gives the model; those are compared with the references in
tests/reference/test_vision.py and tests/infer/test_tiled.py.
"""

import dataclasses
import io
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from dsjax.checkpoint.hf_folder import open_hf
from dsjax.checkpoint.load import load
from dsjax.checkpoint.sighted import load_masters
from dsjax.data.packing import stack
from dsjax.infer.looking import open_looking
from dsjax.infer.pictured import PICTURES
from dsjax.janus import training
from dsjax.janus.objective import seeing_and_drawing
from dsjax.model.transformer import Embeddings
from dsjax.parallel.mesh import make_mesh
from dsjax.text.chat import Message
from dsjax.train.evaluate import batch_sums
from dsjax.train.step import TrainState
from tests.golden import vl2
from tests.janus import toy
from tests.vision import toy as small
from tests.vision.test_sam import CONFIG as HIGH

ROOM = 400  # tokens of a row
SIZES = [(44, 20), (67, 66), (30, 75), (11, 9), (22, 22), (90, 20)]  # of pictures


def one_tower(root):
    return small.write(root, "deepseek_vl", dataclasses.replace(small.VISION, vq=None, head_dim=0))


def two_towers(root):
    vision = dataclasses.replace(small.VISION, vq=None, head_dim=0, high=HIGH)
    means = {"high_res_image_mean": [0.4, 0.5, 0.6], "high_res_image_std": [0.3, 0.25, 0.2]}
    side = {"height": HIGH.image_size, "width": HIGH.image_size}
    return small.write(root, "deepseek_vl_hybrid", vision, high_res_size=side, **means)


def tiles(case):
    return lambda root: vl2.write(root, vl2.CASES[case])


MODELS = {
    "one tower": one_tower,
    "two towers": two_towers,
    "tiles, plain heads": tiles("heads"),
    "tiles, latent heads": tiles("latent"),
}


@pytest.fixture(scope="module", params=MODELS)
def opened(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("seeing")
    config, pairs = toy.write(root), root / "shown"
    pairs.mkdir()
    for number, size in enumerate(SIZES):
        vl2.picture(size).save(pairs / f"{number}.png")
        (pairs / f"{number}.txt").write_text("a sight " * number + str(number))
    config = toy.change(
        config,
        janus={
            "see": str(pairs), "draw": "", "ratio": (1, 0, 0), "trains": ("aligner",),
            "sequence_length": ROOM, "heldout_fraction": 0.0,
        },
        train={"batch_size": 2, "micro_batch_size": 2, "steps": 1, "checkpoint_every": 0},
    )  # fmt: skip
    config = dataclasses.replace(config, init=str(MODELS[request.param](root / "other")))
    checkpoint, form = training.open_initial(config)
    return dataclasses.replace(config, model=checkpoint.model), checkpoint, form


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def nats_alone(config, checkpoint, form):
    """Scores every answer after what inference makes of its question and its picture."""
    looking, language = open_looking(checkpoint, None, "float32"), load(checkpoint, dtype="float32")
    run = jax.jit(
        lambda tokens, given, values: language.logits(
            language.hidden(tokens, embeddings=Embeddings(given, values), mtp=False).main_BTD
        )
    )
    coder, found = form.vocabulary.coder, []
    end = coder.control[form.vocabulary.eos]
    for path in sorted(Path(config.janus.see).glob("*.png")):
        shown = looking.read([path])
        messages = [Message("user", config.janus.question, {PICTURES: shown})]
        prompt = looking.encode(messages)
        seen = looking.given(messages, prompt)
        answer = [*coder.encode(form.gap + path.with_suffix(".txt").read_text()), end]
        tokens = np.zeros((1, ROOM), np.int32)
        tokens[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        given, values = np.zeros((1, ROOM), bool), np.zeros((1, ROOM, checkpoint.model.dim))
        given[0, seen.places], values[0, seen.places] = True, seen.values
        logits = log_softmax(np.asarray(run(tokens, given, values.astype(np.float32)))[0])
        found += [-logits[len(prompt) - 1 + k, each] for k, each in enumerate(answer)]
    return found


def test_loss_is_that_of_every_answer_alone(opened):
    config, checkpoint, form = opened
    said = []
    data = training.read_data(config, checkpoint, form, said.append)
    assert "dropped" not in said[0]
    part = data.training._parts[0]
    assert len(part) > 1
    declared = training.declared_sighted(config, form.vision)
    params, router = load_masters(checkpoint, make_mesh({"data": 1}, n_devices=1))
    score = jax.jit(batch_sums(declared, seeing_and_drawing(config, form.rules)))
    state, total, count = TrainState(params, router, None), 0.0, 0.0
    for first in range(0, 2 * len(part), 2):  # two epochs: every row twice
        found = score(state, stack([data.training[first], data.training[first + 1]]), {})
        total, count = total + float(found["see"]), count + float(found["see_targets"])
    want = nats_alone(config, checkpoint, form)
    assert count == 2 * len(want)
    np.testing.assert_allclose(total, 2 * sum(want), rtol=1e-5)


@pytest.mark.parametrize(
    "keys", [{"ratio": (1, 0, 1), "draw": "x"}, {"trains": ("aligner", "drawing")}]
)
def test_what_does_not_draw_is_not_trained_to(opened, keys):
    config = toy.change(opened[0], janus=keys)
    with pytest.raises(ValueError, match=r"sees and does not draw; set janus.ratio=1,0,0 or 1,1,0"):
        training.open_initial(config)


@pytest.mark.heavy
def test_a_run_trains_all_that_it_says_and_writes_a_folder_that_is_opened_again(
    opened, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "make_mesh", lambda sizes: make_mesh(sizes, n_devices=1))
    config = toy.change(opened[0], janus={"trains": ("language", "tower", "aligner")})
    console = Console(file=io.StringIO(), width=200)
    assert training.train(config, tmp_path / "run", command="again", console=console) == 0
    before, after = (open_hf(Path(each)).files for each in (config.init, tmp_path / "run/model"))
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        one, other = before.read(name), after.read(name)
        # Nothing reads the pooling head, and biases of experts do not move at this speed of 0.
        still = "attn_pool" in name or name.endswith("e_score_correction_bias")
        assert one.dtype == other.dtype
        assert (one.tobytes() == other.tobytes()) == still, name
    checkpoint, form = training.open_initial(
        dataclasses.replace(config, init=str(tmp_path / "run/model"))
    )
    assert form.rules == opened[2].rules and checkpoint.model == opened[1].model

"""The loss of packed rows of three kinds is that of every example alone, worked out in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.load import load
from dsjax.checkpoint.sighted import load_masters
from dsjax.data.packing import stack
from dsjax.janus import training
from dsjax.janus.objective import code_nll, seeing_and_drawing
from dsjax.model.transformer import Embeddings
from dsjax.parallel.mesh import make_mesh
from dsjax.train.evaluate import batch_sums
from dsjax.train.step import TrainState
from dsjax.vision import pictures
from tests.janus import toy

KINDS = ("see", "text", "draw")


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    config = toy.write(tmp_path_factory.mktemp("janus"))
    checkpoint, form = training.open_initial(config)
    config = dataclasses.replace(config, model=checkpoint.model)
    data = training.read_data(config, checkpoint, form, lambda text: None)
    return config, checkpoint, form, data


@pytest.fixture(scope="module")
def alone(opened):
    """(kind, row) -> nats and targets of the row's examples, each run alone."""
    _, checkpoint, form, _ = opened
    language, eyes = load(checkpoint, dtype=np.float32), load_eyes(checkpoint, dtype=np.float32)

    @jax.jit
    def run(tokens, given, values):
        hidden = language.hidden(tokens, embeddings=Embeddings(given, values), mtp=False).main_BTD
        return language.logits(hidden), eyes.pencil.head(hidden)

    def score(row):
        nats = {"tokens": [], "codes": []}
        seen = 0
        for segment in range(1, row["segment_ids"].max() + 1):
            here = np.flatnonzero(row["segment_ids"] == segment)
            ids, codes = row["tokens"][here], row["codes"][here]
            values = np.zeros((64 * 8, 32), np.float32)
            given = np.zeros(64 * 8, bool)
            places = np.flatnonzero(ids == form.image_token)
            if codes.max() < 0 and len(places):
                numbers = pictures.inputs(row["pictures"][seen : seen + 1], form.rules)
                values[places] = np.asarray(eyes(*map(jnp.asarray, numbers)))[0]
                given[places], seen = True, seen + 1
            for place in np.flatnonzero(codes >= 0):
                values[place] = np.asarray(eyes.pencil.embeddings(codes[place : place + 1]))[0]
                given[place] = True
            tokens = np.pad(ids, (0, len(given) - len(ids)))
            text, drawn = (np.asarray(x)[0] for x in run(tokens[None], given[None], values[None]))
            text, drawn = log_softmax(text), log_softmax(drawn)
            for place in range(1, len(here)):
                if row["weights"][here[place]]:
                    nats["tokens"].append(-text[place - 1, ids[place]])
                if codes[place] >= 0:
                    nats["codes"].append(-drawn[place - 1, codes[place]])
        return nats

    return score


def state_of(config, checkpoint, form):
    mesh = make_mesh({"data": 1}, n_devices=1)
    declared = training.declared_sighted(config, form.vision)
    params, router = load_masters(checkpoint, mesh)
    return declared, TrainState(params, router, None)


def test_loss_is_that_of_every_example_alone(opened, alone):
    config, checkpoint, form, data = opened
    declared, state = state_of(config, checkpoint, form)
    rows = [data.training[number] for number in range(4)]
    score = jax.jit(batch_sums(declared, seeing_and_drawing(config, form.rules)))
    found = score(state, stack(rows), {})
    want = {kind: {"tokens": [], "codes": []} for kind in KINDS}
    for number, row in enumerate(rows):
        nats = alone(row)
        for name, values in nats.items():
            want[KINDS[data.training.place(number)[0]]][name] += values
    for kind in KINDS:
        name, other = ("codes", "tokens") if kind == "draw" else ("tokens", "codes")
        assert len(want[kind][name]) == found[f"{kind}_targets"] > 4 and not want[kind][other]
        np.testing.assert_allclose(found[kind], sum(want[kind][name]), rtol=1e-5)
    metrics = seeing_and_drawing(config, form.rules).metrics(found)
    total = sum(sum(each["tokens"] + each["codes"]) for each in want.values())
    count = sum(len(each["tokens"] + each["codes"]) for each in want.values())
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-5)


def test_what_cannot_be_seen_changes_nothing(opened):
    """A picture's pixels reach its own row's answers, and no other row's."""
    config, checkpoint, form, data = opened
    declared, state = state_of(config, checkpoint, form)
    score = jax.jit(batch_sums(declared, seeing_and_drawing(config, form.rules)))
    batch = stack([data.training[number] for number in range(4)])
    before = score(state, batch, {})
    for row, changes in ((0, True), (2, False), (3, False)):
        other = batch["pictures"].copy()
        other[row] = 255 - other[row]
        after = score(state, {**batch, "pictures": other}, {})
        assert (before["see"] != after["see"]) == changes
        assert before["text"] == after["text"] and before["draw"] == after["draw"]


@pytest.mark.parametrize("chunk", [3, 8, 1000])
def test_codes_cost_the_same_in_chunks_of_any_size(opened, chunk):
    _, checkpoint, _, _ = opened
    head = load_eyes(checkpoint, dtype=np.float32).pencil.head
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 7, 32)).astype(np.float32)
    codes = rng.integers(0, 40, (2, 7)).astype(np.int32)
    counted = (rng.random((2, 7)) < 0.6).astype(np.float32)
    hidden[counted == 0] = np.nan  # what does not count has no effect, whatever it is
    found = jax.jit(functools.partial(code_nll, chunk=chunk))(head, hidden, codes, counted)
    logits = log_softmax(np.asarray(head(jnp.nan_to_num(hidden))))
    want = -np.take_along_axis(logits, codes[..., None], -1)[..., 0][counted > 0].sum()
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_frozen_and_trained_parts_cover_all_but_what_nothing_reads(opened):
    config, _, form, _ = opened
    declared = training.declared_sighted(config, form.vision)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(declared, nnx.Param))]
    parts = ("language", "tower", "aligner", "drawing")
    trains = {part: {p for p in paths if training.trained_parts((part,))(p)} for part in parts}
    for one in parts:
        assert trains[one], one
        for other in parts:
            assert one == other or not trains[one] & trains[other]
    left = set(paths) - set().union(*trains.values())
    assert left == {path for path in paths if path[:3] == ("eyes", "pencil", "vq")} != set()

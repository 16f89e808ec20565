"""The loss of drawings in packed rows is that of what the sampler does with each alone; the
sampler itself is compared with DeepSeek's code in tests/test_janusflow.py.
"""

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
from dsjax.generate import flow
from dsjax.janus import examples, training
from dsjax.janus.flowing import Drawings, way_of
from dsjax.janus.objective import seeing_and_drawing
from dsjax.parallel.mesh import make_mesh
from dsjax.train.evaluate import batch_sums
from dsjax.train.step import TrainState
from tests.closeness import LOGITS, assert_close
from tests.janus import toy

DRAWS = (0, 0, 1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        config = toy.write_flow(tmp_path_factory.mktemp("flow"), patch)
        checkpoint, form = training.open_initial(config)
        config = dataclasses.replace(config, model=checkpoint.model)
        yield config, checkpoint, form, training.read_data(config, checkpoint, form, print)


@pytest.fixture(scope="module")
def loaded(opened):
    """The language model and the brush as the sampler has them."""
    _, checkpoint, _, _ = opened
    eyes = load_eyes(checkpoint, dtype=np.float32)
    return load(checkpoint, dtype=np.float32), eyes.brush


def moved(language, brush, drawing):
    """The velocity of the sampler, which runs one drawing alone."""
    tokens_BT, starts_B, length, latents_XYXC, time = drawing
    cache = flow._start(language, tokens_BT, starts_B, room=5)
    painted = flow.Painted(cache, latents_XYXC)
    one = np.float32(1)
    painted = flow._step(language, brush, painted, starts_B, length, time, one, one)
    return (painted.latents_XYXC - latents_XYXC)[0]


def each_drawing(row):
    """Yields the sampler's input, the velocity to predict, and whether the prompt is seen."""
    way = jax.tree.map(np.asarray, way_of(drawings_of(row)))
    for number, start in enumerate(row["starts"]):
        if start < 0:
            continue
        segment = number + 1
        here = np.flatnonzero(abs(row["segment_ids"]) == segment)
        length = start - here[0]  # the token that begins the picture gives way to the time
        sees = bool((row["segment_ids"][here] == segment).all())
        tokens_BT = np.zeros((1, 64), np.int32)
        tokens_BT[0, :length] = row["tokens"][here[0] : start]
        starts_B = np.array([length if sees else 1], np.int32)
        noisy = way.latents_BYXC[number][None], way.time_B[number]
        yield (tokens_BT, starts_B, np.int32(length), *noisy), way.velocity_BYXC[number], sees


def drawings_of(row):
    return Drawings(*(row[name][None] for name in Drawings._fields))


def state_of(config, checkpoint, form):
    declared = training.declared_sighted(config, form.vision)
    params, router = load_masters(checkpoint, make_mesh({"data": 1}, n_devices=1))
    return declared, TrainState(params, router, None)


def test_loss_is_the_squared_error_of_the_samplers_velocity(opened, loaded):
    """Of rows that see their prompts as of those whose prompts are blanked out, which are the
    sampler's second row.
    """
    config, checkpoint, form, data = opened
    declared, state = state_of(config, checkpoint, form)
    objective = seeing_and_drawing(config, form.rules)
    score, velocity = jax.jit(batch_sums(declared, objective)), jax.jit(moved)
    seen = set()
    for first in (0, 4, 8):
        rows = [data.training[first + place] for place in range(4)]
        found = score(state, stack(rows), {})
        errors = []
        for drawing, want, sees in each_drawing(rows[3]):
            difference = velocity(*loaded, drawing) - want
            errors.append(np.square(difference, dtype=np.float64).mean())
            seen.add(sees)
        assert len(errors) > 2 and found["draw_targets"] == 4 * len(errors)
        total = 4 * sum(errors)
        np.testing.assert_allclose(found["draw"], total, rtol=1e-4)
        metrics = objective.metrics(found)
        nats = float(found["see"] + found["text"])
        n = sum(float(found[f"{kind}_targets"]) for kind in ("see", "text", "draw"))
        np.testing.assert_allclose(metrics["loss"], (nats + total) / n, rtol=1e-4)
    assert seen == {True, False}


@pytest.mark.heavy
def test_gradient_is_that_of_the_samplers_squared_error(opened, loaded):
    """Of the first U-ViT too, whose output both the language model and the second one read: rows
    run it once for the two, and so does the sampler, but one drawing at a time and from a cache.
    """
    config, checkpoint, form, data = opened
    declared, state = state_of(config, checkpoint, form)
    sums = batch_sums(declared, seeing_and_drawing(config, form.rules))
    batch = stack([data.training[place] for place in range(4)])

    @jax.jit
    @jax.grad
    def of_rows(params):
        return sums(dataclasses.replace(state, params=params), batch, {})["draw"]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def of_one(language, brush, drawing, want):
        return 4 * jnp.square(moved(language, brush, drawing) - want).mean()

    each = [of_one(*loaded, *one[:2]) for one in each_drawing(data.training[3])]
    language, brush = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *each)
    got = flat(of_rows(state.params))
    wanted = flat(language) | {f"eyes.brush.{name}": x for name, x in flat(brush).items()}
    assert got.keys() >= wanted.keys()
    for name, gradient in got.items():
        if name in wanted:
            assert_close(gradient, wanted[name], LOGITS, name)
        else:
            assert not gradient.any(), name


def flat(tree):
    """Arrays by name."""
    return {
        ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(tree))
    }


def test_a_prompt_that_is_blanked_out_changes_nothing_and_another_does(opened):
    config, checkpoint, form, data = opened
    declared, state = state_of(config, checkpoint, form)
    score = jax.jit(batch_sums(declared, seeing_and_drawing(config, form.rules)))
    batch = stack([data.training[place] for place in range(4)])
    before = score(state, batch, {})
    masked = batch["segment_ids"] < 0
    assert masked.any()
    shown = (batch["segment_ids"] > 0) & (batch["features"] < 0)
    shown[:3] = False
    for where, changes in ((masked, False), (shown, True)):
        tokens = np.where(where, (batch["tokens"] + 1) % 250, batch["tokens"])
        after = score(state, batch | {"tokens": tokens}, {})
        assert (before["draw"] != after["draw"]) == changes
        assert before["see"] == after["see"] and before["text"] == after["text"]


def test_way_leads_straight_from_noise_to_the_latents():
    rng = np.random.default_rng(0)
    n = 400
    latents = rng.uniform(0.5, 2.0, (n // 4, 4, 2, 4, 4, 3)).astype(np.float32)
    drawings = Drawings(latents, np.arange(n, dtype=np.uint32).reshape(-1, 4), np.zeros((100, 4)))
    way = jax.tree.map(np.asarray, jax.jit(way_of)(drawings))
    time = way.time_B[:, None, None, None]
    noise = way.latents_BYXC - time * way.velocity_BYXC
    mean, deviation = latents.reshape(n, 2, 4, 4, 3).swapaxes(0, 1)
    picture = (way.latents_BYXC + (1 - time) * way.velocity_BYXC - mean) / deviation
    logit = np.log(way.time_B / (1 - way.time_B))
    for normal in (noise, picture, logit):
        size = normal.size**0.5
        assert abs(normal.mean()) < 4 / size and abs(normal.std() - 1) < 4 / size
    for one, other in ((noise[:, 0, 0, 0], picture[:, 0, 0, 0]), (noise[:, 0, 0, 0], logit)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_noise_is_new_in_every_epoch_and_the_same_when_it_is_read_again(opened):
    *_, data = opened
    part, shape = data.training._parts[2], data.training.shape

    def seeds(epoch):
        rows = [part.row(epoch * len(part) + number, shape) for number in range(len(part))]
        return {int(seed) for row in rows for seed in row["seeds"][row["starts"] >= 0]}

    epochs = [seeds(epoch) for epoch in range(3)]
    assert epochs == [seeds(epoch) for epoch in range(3)]
    kept = toy.COUNT - round(0.25 * toy.COUNT)
    assert len(set.union(*epochs)) == 3 * kept


@pytest.mark.parametrize(
    ("drawings", "spare"), [(1, 0), (1, -1), (2, -1)], ids=["fits", "too long", "two in a row"]
)
def test_all_latents_of_the_longest_drawings_are_run(opened, drawings, spare):
    """A row runs T of its T + 1 tokens, and latents are all inputs."""
    config, checkpoint, form, _ = opened
    texts = ["noise " * (number % 3) + str(number) for number in range(toy.COUNT)]
    lengths = sorted(len(examples.draw_example(form, text).ids) for text in texts)
    length = sum(lengths[-drawings:]) + spare
    short = toy.change(config, janus={"ratio": DRAWS, "sequence_length": length})
    said = []
    data = training.read_data(short, checkpoint, form, said.append)
    assert ("dropped" in said[0]) == (lengths[-1] > length)
    rows = [data.training[number] for number in range(len(data.training._parts[2]))]
    for row in rows:
        starts = row["starts"][row["starts"] >= 0]
        assert len(starts) and starts.max() + 4 < length

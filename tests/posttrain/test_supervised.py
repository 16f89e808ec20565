"""The loss of fine-tuning: the mean over trained tokens, and its known mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.finetuning import FineTuning, SftConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.messages import TokenizedConversations
from dsjax.posttrain.rows import ConversationRows
from dsjax.posttrain.supervised import supervised
from dsjax.precision.policy import Policy
from dsjax.train.loss import next_tokens, target_mask
from dsjax.train.objective import ForwardPass
from dsjax.train.optimizer import adamw
from dsjax.train.step import TrainState, abstract_state, split, train_step
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY, tiny_model
from tests.train.objectives import sums_of

MODEL = dataclasses.replace(TINY, n_layers=2, n_mtp=1)
LENGTHS = (5, 3, 4, 7, 2, 6, 8, 5, 12, 9) * 2
LENGTH = 15  # of a row, in predicted tokens


def config(**sft):
    return FineTuning(
        name="x",
        model=MODEL,
        sft=SftConfig(sequence_length=LENGTH, **sft),
        train=TuningConfig(batch_size=4, loss_chunk=16, remat="none"),
        precision=PrecisionConfig(compute="float32"),
    )


def conversations():
    rng = np.random.default_rng(0)
    total = sum(LENGTHS)
    trained = rng.random(total) < 0.6
    trained[np.cumsum(LENGTHS) - 1] = True  # each one's end token
    offsets = np.cumsum([0, *LENGTHS], dtype=np.int64)
    ids = rng.integers(0, MODEL.vocab_size, total).astype(np.int32)
    return TokenizedConversations(ids, trained, offsets, 0, 0, 0)


def packed():
    rows = ConversationRows(conversations(), np.arange(len(LENGTHS)), sequence_length=LENGTH, pad=0)
    assert len(rows) == 8 < len(LENGTHS)
    return {name: jnp.asarray(x) for name, x in rows.batch(range(len(rows))).items()}


def alone(number):
    """A conversation as the only one of its row."""
    rows = ConversationRows(conversations(), np.array([number]), sequence_length=LENGTH, pad=0)
    return {name: jnp.asarray(x) for name, x in rows.batch([0]).items()}


@functools.cache
def _sums(objective):
    return jax.jit(lambda model, batch: sums_of(objective, model, batch)[0])


SUPERVISED = supervised(config())


def run(batch, objective=SUPERVISED):
    return _sums(objective)(tiny_model(MODEL), batch)


@pytest.fixture(scope="module")
def each():
    return [run(alone(number)) for number in range(len(LENGTHS))]


def test_packed_loss_is_that_of_each_conversation_alone(each):
    together = run(packed())
    for name in ("main", "main_targets"):
        want = sum(float(sums[name]) for sums in each)
        assert float(together[name]) == pytest.approx(want, rel=1e-6)
    assert float(together["mtp"]) == float(together["mtp_targets"]) == 0


def test_loss_is_that_of_the_labels(each):
    """Every token by itself, from the logits of its conversation alone."""
    ids, trained = conversations().one(6)
    logp = jax.nn.log_softmax(
        jax.jit(lambda model, ids: model(ids))(tiny_model(MODEL), ids[None, :-1])
    )
    nats = [-float(logp[0, t - 1, ids[t]]) for t in range(1, len(ids)) if trained[t]]
    assert float(each[6]["main"]) == pytest.approx(sum(nats), rel=1e-5)
    assert float(each[6]["main_targets"]) == len(nats)


def test_neighbours_in_a_row_are_not_seen(each):
    """The known mistake: without isolation the packed loss is another one."""
    forward = SUPERVISED.forward._replace(isolate=False)
    wrong = run(packed(), SUPERVISED._replace(forward=forward))
    want = sum(float(sums["main"]) for sums in each)
    assert abs(float(wrong["main"]) / want - 1) > 1e-3


def _shifted(weights, by):
    return jnp.roll(weights, by, axis=-1)


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        (lambda batch: jnp.ones_like(batch["weights"]), "prompt in the mask"),
        (lambda batch: batch["weights"].at[0, LENGTHS[6] - 1].set(0), "end token left out"),
        (lambda batch: _shifted(batch["weights"], -1), "mask of inputs, not of targets"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_known_mistakes_change_the_loss(each, mistake, name):
    batch = alone(6)
    assert 0 < batch["weights"][0, 1:].sum() < LENGTHS[6] - 1
    wrong = run(batch | {"weights": mistake(batch)})
    right = float(each[6]["main"]) / float(each[6]["main_targets"])
    assert abs(float(wrong["main"]) / float(wrong["main_targets"]) / right - 1) > 1e-3, name


def test_padding_is_never_a_target_even_if_it_is_called_trained(each):
    """As where the pad token is the end token, and the mask was made from ids."""
    batch = packed()
    trained = batch | {"weights": jnp.where(batch["segment_ids"] == 0, 1.0, batch["weights"])}
    assert_close(run(trained)["main"], run(batch)["main"], F32, "padding")


def _state():
    optimizer = adamw(OptimConfig(clip_norm=0.0))
    _, params, router = split(tiny_model(MODEL))
    return optimizer, TrainState(params, router, optimizer.init(params))


KNOBS = {"learning_rate": 1e-3, "bias_update_speed": 0.0, "mtp_weight": 0.3}


def _step(n_micro_batches, sizes=None, **sft):
    optimizer, state = _state()
    declared = Transformer(MODEL, Policy(jnp.float32))
    step = train_step(declared, optimizer, supervised(config(**sft)))
    batch = packed()
    cut = {k: x.reshape(n_micro_batches, -1, LENGTH + 1) for k, x in batch.items()}
    mesh = make_mesh(sizes or {"data": 1}, int(np.prod(list((sizes or {"data": 1}).values()))))
    if sizes:
        placed = jax.tree.map(
            lambda x, leaf: jax.device_put(x, leaf.sharding),
            state,
            abstract_state(declared, optimizer, mesh),
        )
        state = placed
    knobs = {name: jnp.float32(value) for name, value in KNOBS.items()}
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(step)(state, cut, knobs))


@pytest.fixture(scope="module")
def whole():
    return _step(1)


@pytest.mark.heavy
def test_mean_is_over_the_whole_batch_not_over_micro_batches(whole):
    parts = _step(2)
    assert_close(parts[1]["loss"], whole[1]["loss"], F32, "loss")
    bound = F32._replace(bound=5e-5)
    for got, want in zip(*(jax.tree.leaves(s.optimizer["adam"].mu) for s, _ in (parts, whole)),
                         strict=True):  # fmt: skip
        assert_close(got, want, bound, "gradient")
    batch = packed()
    halves = [{k: x[i : i + 4] for k, x in batch.items()} for i in (0, 4)]
    means = [float(s["main"]) / float(s["main_targets"]) for s in map(run, halves)]
    assert abs(np.mean(means) / float(whole[1]["loss"]) - 1) > 1e-3  # the known mistake


@pytest.mark.heavy
def test_mesh_of_eight_devices_trains_as_one(whole):
    got = _step(1, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    assert_close(got[1]["loss"], whole[1]["loss"], F32, "loss")
    for left, right in zip(*(jax.tree.leaves(s.optimizer["adam"].mu) for s, _ in (got, whole)),
                           strict=True):  # fmt: skip
        assert_close(left, right, F32._replace(bound=1e-4), "gradient")


def test_mtp_is_trained_on_the_same_targets_when_asked():
    sums = run(alone(6), supervised(config(mtp="on")))
    _, trained = conversations().one(6)
    assert float(sums["mtp_targets"]) == trained[2:].sum() and float(sums["mtp"]) > 0


def test_routers_are_balanced_only_when_asked():
    assert supervised(config()).forward.balance is None
    asked = dataclasses.replace(config(), train=TuningConfig(batch_size=4, sequence_balance=0.1))
    assert supervised(asked).forward.balance.sequence == 0.1
    assert supervised(asked).forward.balance.isolated


def test_objective_is_pretrainings_when_everything_is_trained():
    batch = packed() | {"weights": jnp.ones((8, LENGTH + 1), jnp.float32)}
    forward = ForwardPass(True, False, None, "none")
    plain = next_tokens(
        forward, lambda b, k: target_mask(b["segment_ids"], k, True), n_mtp=0, chunk=16
    )
    want = run(batch, plain)
    assert float(run(batch)["main"]) == float(want["main"])

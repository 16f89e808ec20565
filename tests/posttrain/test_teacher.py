"""Distillation by logits against whole logits in float64, on any cut of the batch and any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import OptimConfig
from dsjax.config.distillation import DistillConfig
from dsjax.config.finetuning import FineTuning, SftConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.distill import forward_kl, reverse_kl
from dsjax.posttrain.initial import all_but_mtp, open_initial
from dsjax.posttrain.supervised import supervised
from dsjax.posttrain.teacher import (
    TaughtRows,
    asked_before,
    beside,
    fits,
    likeliest,
    open_teacher,
    teacher_store,
)
from dsjax.precision.policy import Policy
from dsjax.train.objective import read_batch
from dsjax.train.optimizer import adamw
from dsjax.train.step import TrainState, split, train_step
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY, tiny_model
from tests.posttrain.toy import write_hf

STUDENT = dataclasses.replace(TINY, n_layers=2, n_dense_layers=1, n_mtp=1)
# Wider and without experts; the vocabulary is the same.
TEACHER = dataclasses.replace(
    TINY, dim=48, n_layers=1, n_dense_layers=1, n_mtp=0, n_routed_experts=0, n_shared_experts=0,
    n_activated_experts=0, router_bias=False,
)  # fmt: skip
LENGTH, ROWS, TAU = 12, 4, 2.0


def config(**distill):
    return FineTuning(
        name="test",
        model=STUDENT,
        sft=SftConfig(sequence_length=LENGTH),
        distill=DistillConfig(kind="logits", teacher="t", temperature=TAU, **distill),
        train=TuningConfig(batch_size=ROWS, loss_chunk=16, remat="none"),
    )


def batch():
    """Rows of two conversations and padding; about half of the tokens are trained."""
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH + 1)
    segment_ids = np.where(np.arange(LENGTH + 1) < 7, 1, 2) * np.ones(shape, np.int32)
    segment_ids[:, 11:] = 0
    return {
        "tokens": jnp.asarray(rng.integers(0, STUDENT.vocab_size, shape), jnp.int32),
        "segment_ids": jnp.asarray(segment_ids, jnp.int32),
        "weights": jnp.asarray(rng.random(shape) < 0.5, jnp.float32),
    }


def counted(rows):
    segments, weights = np.asarray(rows["segment_ids"]), np.asarray(rows["weights"])
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return same & (weights[:, 1:] > 0)


def log_shares(model, rows):
    logits = model(rows["tokens"][:, :-1], rows["segment_ids"][:, :-1])
    logits = np.asarray(logits, np.float64) / TAU
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def teacher():
    return nnx.split(tiny_model(TEACHER, seed=1))


def sums(objective, rows, knobs):
    model = tiny_model(STUDENT)
    micro_batches = {name: array[None] for name, array in rows.items()}
    inputs, targets = jax.tree.map(lambda x: x[0], read_batch(objective, model, micro_batches))
    return objective.sums(model, model.forward(inputs), targets, knobs)


def asked(rows, k):
    """What the teacher says of the rows, as a batch has it."""
    structure, values = teacher()
    said = likeliest(config(top_k=k), structure)(values, rows)
    last = ((0, 0), (0, 1), (0, 0))
    return {f"teacher_{name}": jnp.pad(array, last) for name, array in said._asdict().items()}


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_a_teacher_beside_the_student_gives_the_oracles_loss(divergence):
    rows, (structure, values) = batch(), teacher()
    objective = beside(supervised(config()), config(), structure, divergence)
    found = sums(objective, rows, {"teacher": values})
    log_p, log_q = (log_shares(tiny_model(*m), rows) for m in ((TEACHER, 1), (STUDENT,)))
    if divergence is reverse_kl:
        log_p, log_q = log_q, log_p
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1) * TAU**2
    assert_close(found["kl"], kl[counted(rows)].sum(), F32, "divergence")
    assert float(found["targets"]) == counted(rows).sum() > 0


@pytest.mark.parametrize("k", [3, STUDENT.vocab_size - 1])
def test_a_teacher_that_was_asked_before_gives_the_loss_of_what_it_said(k):
    rows = batch()
    found = sums(
        asked_before(supervised(config(top_k=k)), config(top_k=k)), rows | asked(rows, k), {}
    )
    log_p, log_q = (log_shares(tiny_model(*m), rows) for m in ((TEACHER, 1), (STUDENT,)))
    ids = np.argsort(-log_p, axis=-1)[..., :k]
    p, q = (np.take_along_axis(np.exp(x), ids, axis=-1) for x in (log_p, log_q))
    p, q = (np.concatenate([x, 1 - x.sum(axis=-1, keepdims=True)], axis=-1) for x in (p, q))
    kl = (p * np.log(p / q)).sum(axis=-1) * TAU**2
    assert_close(found["kl"], kl[counted(rows)].sum(), F32, "divergence")


def step(objective, rows, knobs, n_micro_batches=1, sizes=None):
    """Parameters after a step, and what it reports."""
    model, optimizer = tiny_model(STUDENT), adamw(OptimConfig(clip_norm=0.0), all_but_mtp)
    _, params, router = split(model)
    state = TrainState(params, router, optimizer.init(params))
    rows = {
        name: array.reshape(n_micro_batches, -1, *array.shape[1:]) for name, array in rows.items()
    }
    knobs = {"learning_rate": jnp.float32(1e-3), "bias_update_speed": jnp.float32(0), **knobs}
    declared = type(model)(STUDENT, Policy(jnp.float32))
    with jax.set_mesh(make_mesh(sizes or {"data": 1}, 8 if sizes else 1)):
        return jax.jit(train_step(declared, optimizer, objective))(state, rows, knobs)


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 5])
def test_step_is_the_same_however_the_batch_is_cut_and_spread(k):
    rows, (structure, values) = batch(), teacher()
    rows = {name: jnp.concatenate([array, array[::-1]]) for name, array in rows.items()}
    wanted = config(top_k=k)
    if k:
        objective, knobs, rows = asked_before(supervised(wanted), wanted), {}, rows | asked(rows, k)
    else:
        objective, knobs = beside(supervised(wanted), wanted, structure), {"teacher": values}
    state, metrics = step(objective, rows, knobs)
    again, same = step(objective, rows, knobs, 2, {"tensor": 2, "expert": 2, "context": 2})
    for name in ("loss", "grad_norm"):
        assert_close(same[name], metrics[name], F32, name)
    for got, want in zip(*map(jax.tree.leaves, (again.params, state.params)), strict=True):
        # Adam divides by the gradient's size, which magnifies rounding of the smallest.
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5)
    assert "skipped" in metrics and not metrics["skipped"]


def test_a_teacher_that_is_the_student_teaches_nothing():
    rows = batch()
    structure, values = nnx.split(tiny_model(STUDENT))
    objective = beside(supervised(config()), config(), structure)

    def loss(model):
        micro_batches = {name: array[None] for name, array in rows.items()}
        inputs, targets = jax.tree.map(lambda x: x[0], read_batch(objective, model, micro_batches))
        return objective.sums(model, model.forward(inputs), targets, {"teacher": values})["kl"]

    value, gradients = jax.value_and_grad(loss)(tiny_model(STUDENT))
    assert abs(float(value)) < 1e-5
    assert all(np.abs(leaf).max() < 1e-5 for leaf in jax.tree.leaves(gradients))


class Rows:
    sequence_length, fingerprint = 2, "f"

    def __len__(self):
        return 3

    def __getitem__(self, row):
        return {"tokens": np.full(3, row, np.int32)}


def test_rows_come_with_what_was_said_of_them():
    said = {"ids": np.arange(12).reshape(3, 2, 2), "logp": np.zeros((3, 2, 3), np.float32)}
    row = TaughtRows(Rows(), said)[1]
    np.testing.assert_array_equal(row["teacher_ids"], [[4, 5], [6, 7], [0, 0]])
    assert row["teacher_logp"].shape == (3, 3) and row["tokens"].tolist() == [1, 1, 1]


def test_teachers_of_another_vocabulary_are_refused(tmp_path):
    student = open_initial(write_hf(tmp_path / "student"))
    vocabulary, size = student.vocabulary, student.model.vocab_size
    same = write_hf(tmp_path / "wide", "V2", hidden_size=64)
    assert open_teacher(same, vocabulary, size).model.dim == 64
    larger = write_hf(tmp_path / "larger", vocab_size=280)
    with pytest.raises(ValueError, match=r"another vocabulary.*\(280 logits and 272\).*samples"):
        open_teacher(larger, vocabulary, size)
    other = write_hf(tmp_path / "other", control="V3")
    with pytest.raises(ValueError, match=r"another vocabulary.*tokenizers differ.*tools/sample"):
        open_teacher(other, vocabulary, size)


def test_what_a_teacher_cannot_judge_is_refused(tmp_path):
    checkpoint = open_teacher(
        folder := write_hf(tmp_path / "t", max_position_embeddings=8),
        open_initial(folder).vocabulary,
        272,
    )
    alone = make_mesh({"data": 1}, 1)
    with pytest.raises(ValueError, match=r"sft\.sequence_length=12 exceeds the max_seq_len=8"):
        fits(config(), checkpoint, alone)
    longer = dataclasses.replace(
        checkpoint, model=dataclasses.replace(checkpoint.model, max_seq_len=64)
    )
    with pytest.raises(ValueError, match=r"distill\.top_k=272 is not less.*use 64"):
        fits(config(top_k=272), longer, alone)
    with pytest.raises(ValueError, match=r"mesh\.pipe=2.*set mesh\.pipe=1 or distill\.top_k=64"):
        fits(config(), longer, make_mesh({"pipe": 2}, 2))
    fits(config(top_k=64), longer, make_mesh({"pipe": 2}, 2))


def test_what_is_kept_belongs_to_one_teacher_and_temperature(tmp_path):
    kept = teacher_store(config(top_k=2), tmp_path, Rows(), "w")
    kept.append({"ids": np.zeros((3, LENGTH, 2)), "logp": np.zeros((3, LENGTH, 3))})
    assert kept.complete
    for weights in ("w", None):
        teacher_store(config(top_k=2), tmp_path, Rows(), weights).claim(begun=True)
    with pytest.raises(ValueError, match="weights was 'w' and is now 'v'"):
        teacher_store(config(top_k=2), tmp_path, Rows(), "v").claim(begun=True)
    hotter = dataclasses.replace(
        config(top_k=2),
        distill=dataclasses.replace(config(top_k=2).distill, temperature=1.0),
    )
    with pytest.raises(ValueError, match=r"temperature was 2\.0 and is now 1\.0"):
        teacher_store(hotter, tmp_path, Rows(), None).claim(begun=True)

"""A student's own answers become the rows that it trains on, the same again after a resume."""

import dataclasses

import jax
import numpy as np
import pytest

from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.distillation import DistillConfig
from dsjax.config.finetuning import FineTuning, SftConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.initial import all_but_mtp, open_initial
from dsjax.posttrain.on_policy import OnPolicy
from dsjax.train.optimizer import adamw
from dsjax.train.step import declared_model
from tests.posttrain.toy import write_hf

PROMPTS = [(0, 70, 71), (0, 80), (0, 90, 91, 92), (0, 100)]
NEW = 5


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_policy") / "hf"
    initial = open_initial(write_hf(folder, "Qwen2", num_hidden_layers=1))
    config = initial.fill(
        FineTuning(
            name="student",
            sft=SftConfig(sequence_length=16, seed=2),
            distill=DistillConfig(kind="on_policy", teacher="t", max_new_tokens=NEW),
            train=TuningConfig(batch_size=4, micro_batch_size=2),
            precision=PrecisionConfig(compute="float32"),
        )
    )
    mesh = make_mesh({"data": 1}, 1)
    declared = declared_model(config.shape, config.precision)
    state = initial.state(declared, adamw(OptimConfig(), all_but_mtp), mesh)
    return config, initial.vocabulary, declared, mesh, state


def source(student, prompts=PROMPTS, **distill):
    config, vocabulary, declared, mesh, _ = student
    config = dataclasses.replace(config, distill=dataclasses.replace(config.distill, **distill))
    return OnPolicy(config, prompts, vocabulary, declared, mesh)


def pieces(batch):
    """Prompt and answer of each segment of a batch."""
    found = []
    rows = {name: np.asarray(array).reshape(-1, array.shape[-1]) for name, array in batch.items()}
    for tokens, segments, weights in zip(
        rows["tokens"], rows["segment_ids"], rows["weights"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            trained = weights[here] > 0
            found.append((tuple(tokens[here][~trained]), tuple(tokens[here][trained])))
    return found


def test_every_prompt_is_answered_once_per_epoch(student):
    own, state = source(student), student[-1]
    epochs = [own.take(4, state) for _ in range(2)]
    for taken in epochs:
        found = pieces(taken.batch)
        assert sorted(prompt for prompt, _ in found) == sorted(PROMPTS)
        assert all(0 < len(answer) <= NEW for _, answer in found)
        assert taken.tokens == sum(len(answer) for _, answer in found)
        assert taken.batch["tokens"].shape[1] == 2  # rows of a micro-batch
        assert set(taken.batch) == {"tokens", "segment_ids", "weights"}
        assert 0 < taken.metrics["length"] <= NEW
    assert pieces(epochs[0].batch) != pieces(epochs[1].batch)
    assert (epochs[0].rows, epochs[1].rows) == (range(4), range(4, 8))


def test_answers_are_drawn_again_after_a_resume(student):
    first, state = source(student), student[-1]
    first.take(2, state)
    record = first.state()
    want = first.take(2, state)
    again = source(student)
    again.restore(record)
    for got, same in zip(
        jax.tree.leaves(again.take(2, state).batch), jax.tree.leaves(want.batch), strict=True
    ):
        np.testing.assert_array_equal(got, same)
    other = source(student, PROMPTS[:3])
    with pytest.raises(ValueError, match=r"trained on prompts.*restore sft\.files and sft\.seed"):
        other.restore(record)


def test_prompts_without_room_for_an_answer_are_refused(student):
    with pytest.raises(ValueError, match=r"make 304 tokens.*max_seq_len=256.*max_new_tokens"):
        source(student, max_new_tokens=300)

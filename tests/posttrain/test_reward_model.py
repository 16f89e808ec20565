"""A reward model is a checkpoint's body with a new head; its run scores answers, nothing else."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import multihost_utils

import dsjax
from dsjax import settings
from dsjax.checkpoint import store
from dsjax.checkpoint.load import open_checkpoint
from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.posttraining import PostTraining
from dsjax.config.preference import Preference, PreferenceConfig
from dsjax.files import write_json
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.initial import open_initial
from dsjax.posttrain.reward_model import RewardModel, load_reward_model, new_head, trains
from dsjax.train.optimizer import adamw
from dsjax.train.step import abstract_state, declared_model, restored_model
from tests.closeness import F32, assert_close
from tests.posttrain.toy import write_hf


def begun(base, sizes):
    """What a reward model's run begins with, on a mesh."""
    initial = open_initial(base)
    mesh = make_mesh(sizes, int(np.prod(list(sizes.values()))))
    policy = declared_model(initial.model, PrecisionConfig(compute="float32")).policy
    declared, optimizer = RewardModel(initial.model, policy), adamw(OptimConfig(), trains)
    state = initial.state(declared, optimizer, mesh, new_head(initial.model, mesh, 3))
    return initial, declared, state, abstract_state(declared, optimizer, mesh)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("reward") / "hf", "V3 MTP")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    initial, _, state, _ = begun(base, {"data": 1})
    folder = tmp_path_factory.mktemp("reward") / "run"
    folder.mkdir()
    config = Preference(name="r", preference=PreferenceConfig(kind="bradley_terry"))
    config = dataclasses.replace(
        config, preference=dataclasses.replace(config.preference, sequence_length=16)
    )
    write_json(folder / "config.json", settings.to_dict(initial.fill(config)))
    initial.keep_files(folder)
    checkpoints = store.Store(folder / "checkpoints", keep=1)
    checkpoints.save(2, state, {"step": 2})
    checkpoints.close()
    return folder


def test_state_is_the_checkpoint_with_a_new_head(base):
    _, declared, state, _ = begun(base, {"data": 1})
    model = nnx.state(dsjax.load(base, dtype="float32"))
    head = state.params["reward"]["weight"][...]
    assert head.shape == (declared.config.dim, 1)
    assert np.std(head) == pytest.approx(1 / np.sqrt(declared.config.dim + 1), rel=0.4)
    for path, want in nnx.to_flat_state(model):
        got = dict(nnx.to_flat_state(nnx.merge_state(state.params, state.router)))[path]
        np.testing.assert_array_equal(got[...], want[...])
    adam = {path[0] for path, _ in nnx.to_flat_state(state.optimizer["adam"].mu)}
    assert "reward" in adam and not adam & {"head", "mtp"}


def test_state_lies_on_the_mesh_as_a_restored_one_would(base):
    _, _, whole, _ = begun(base, {"data": 1})
    _, _, spread, abstract = begun(base, {"data": 2, "fsdp": 2, "tensor": 2})
    assert jax.tree.structure(spread) == jax.tree.structure(abstract)
    for got, want, same in zip(*map(jax.tree.leaves, (spread, abstract, whole)), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
        np.testing.assert_array_equal(got, same)


def test_run_loads_back_as_a_scorer(base, run):
    _, declared, state, _ = begun(base, {"data": 1})
    model = restored_model(declared, state)
    rng = np.random.default_rng(0)
    answers = [rng.integers(3, 259, length).tolist() for length in (5, 70, 1)]
    scorer = load_reward_model(run, dtype="float32")
    together = scorer.many(answers)
    for ids, got in zip(answers, together, strict=True):
        hidden = model.hidden(np.array([ids], np.int32), mtp=False).main_BTD
        want = np.asarray(hidden)[0, -1] @ np.asarray(model.reward.weight[...])[:, 0]
        assert_close(got, want, F32, "score")
        assert isinstance(scorer(ids), float)
        assert_close(scorer(ids), want, F32, "score alone")
    assert len(set(together)) == 3 and scorer.many([]) == []
    assert scorer.chat.name == "R1"
    with pytest.raises(ValueError, match=r"0 to 5 tokens.*judges 1 to 256"):
        scorer.many([answers[0], []])
    with pytest.raises(ValueError, match="max_seq_len"):
        scorer([5] * 257)


def test_one_of_several_processes_loads_it_alone(run, monkeypatch):
    """As the one that judges does, while the others wait for its verdicts."""
    whole = load_reward_model(run, dtype="float32")([5, 6, 7])

    def called(value):
        raise AssertionError("the other processes do not take part")

    monkeypatch.setattr(multihost_utils, "process_allgather", called)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert load_reward_model(run, dtype="float32")([5, 6, 7]) == whole


@pytest.mark.heavy
def test_scores_are_the_same_on_eight_devices(run):
    answers = [[5, 6, 7], list(range(3, 73)), [9]]
    alone = load_reward_model(run, dtype="float32").many(answers)
    mesh = make_mesh({"data": 2, "context": 2, "tensor": 2})
    spread = load_reward_model(run, mesh=mesh, dtype="float32").many(answers)
    assert_close(np.array(spread), np.array(alone), F32, "scores")


def test_a_language_model_and_a_reward_model_are_not_taken_for_each_other(base, run, tmp_path):
    with pytest.raises(ValueError, match=r"is a reward model, which scores answers.*began with"):
        open_checkpoint(run)
    with pytest.raises(ValueError, match="is a reward model"):
        open_initial(run)
    with pytest.raises(ValueError, match=r"not the run of a reward model.*tools/prefer\.py"):
        load_reward_model(base)
    initial = open_initial(base)
    folder = tmp_path / "language"
    folder.mkdir()
    write_json(folder / "config.json", settings.to_dict(initial.fill(PostTraining(name="l"))))
    declared = declared_model(initial.model, PrecisionConfig(compute="float32"))
    state = initial.state(declared, adamw(OptimConfig()), make_mesh({"data": 1}, 1))
    checkpoints = store.Store(folder / "checkpoints", keep=1)
    checkpoints.save(1, state, {"step": 1})
    checkpoints.close()
    with pytest.raises(ValueError, match=r"language model, not a reward model.*tools/prefer\.py"):
        load_reward_model(folder)

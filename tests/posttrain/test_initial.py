"""A run of post-training begins with the weights, the shape and the text files of a checkpoint."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import dsjax
from dsjax import settings
from dsjax.checkpoint import store
from dsjax.checkpoint.load import open_checkpoint
from dsjax.config import OptimConfig, PrecisionConfig
from dsjax.config.posttraining import PostTraining
from dsjax.files import write_json
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.initial import all_but_mtp, open_initial
from dsjax.train.optimizer import adamw
from dsjax.train.step import abstract_state, declared_model
from tests.checkpoint.conversions import bring_in, send_out
from tests.posttrain.toy import CONTROL, write_hf
from tests.text.released import write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("initial") / "hf", "V3 MTP", dtype="bfloat16")


def _state(folder, sizes):
    initial = open_initial(folder)
    mesh = make_mesh(sizes, int(np.prod(list(sizes.values()))))
    optimizer = adamw(OptimConfig(moment_dtype="bfloat16"), all_but_mtp)
    declared = declared_model(initial.model, PrecisionConfig(compute="float32"))
    return initial.state(declared, optimizer, mesh), abstract_state(declared, optimizer, mesh)


@pytest.fixture(scope="module")
def state(base):
    return _state(base, {"data": 1})[0]


def test_state_has_the_checkpoints_weights_and_new_moments(base, state):
    model = nnx.state(dsjax.load(base, dtype="float32"))
    own = nnx.merge_state(state.params, state.router)
    for (path, got), (also, want) in zip(
        nnx.to_flat_state(own), nnx.to_flat_state(model), strict=True
    ):
        assert path == also and got[...].dtype == np.float32
        np.testing.assert_array_equal(got[...], want[...], str(path))
    adam = state.optimizer["adam"]
    assert int(adam.count) == 0 and not any(leaf.any() for leaf in jax.tree.leaves(adam.mu))
    assert any("mtp" in path for path, _ in nnx.to_flat_state(state.params))
    trained = {path[0] for path, _ in nnx.to_flat_state(adam.mu)}
    assert trained == {"embed", "moe_layers", "norm", "head"}
    biases = jax.tree.leaves(state.router)
    assert biases and all(bias.any() for bias in biases)


def test_state_lies_on_the_mesh_as_a_restored_one_would(base, state):
    spread, abstract = _state(base, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    for got, want, whole in zip(*map(jax.tree.leaves, (spread, abstract, state)), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
        np.testing.assert_array_equal(got, whole)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread.params))


def _write_run(folder, initial, state):
    config = initial.fill(PostTraining(name="tuned"))
    folder.mkdir()
    write_json(folder / "config.json", settings.to_dict(config))
    initial.keep_files(folder)
    checkpoints = store.Store(folder / "checkpoints", keep=1)
    checkpoints.save(3, state, {"step": 3})
    checkpoints.close()
    return folder


def test_run_keeps_what_it_needs_of_a_checkpoint_that_goes(base, state, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(base, gone)
    before = open_initial(gone, run=tmp_path / "run")
    run = _write_run(tmp_path / "run", before, state)
    kept = sorted(path.name for path in (run / "hf").iterdir())
    shutil.rmtree(gone)
    again = open_initial(gone, run=run)
    assert again.model == before.model and again.chat.name == before.chat.name
    assert again.vocabulary.coder.control == before.vocabulary.coder.control
    assert again.fill(PostTraining(name="tuned")).init == str(gone)
    again.keep_files(run)
    assert sorted(path.name for path in (run / "hf").iterdir()) == kept
    with pytest.raises(ValueError, match=r"gone, which the run began with, is gone, and its weig"):
        again.checkpoint.read(("head", "weight"), ())
    unfinished = tmp_path / "unfinished"  # without a checkpoint of its own
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("checkpoints"))
    for path, folder in ((tmp_path / "other", run), (gone, unfinished), (gone, None)):
        with pytest.raises(ValueError, match=r"(other|gone) does not exist; name the folder"):
            open_initial(path, run=folder)


def test_run_is_a_checkpoint_that_the_next_one_begins_with(base, state, tmp_path):
    initial = open_initial(base)
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    run = _write_run(tmp_path / "run", initial, state)
    (base / "chat_template.jinja").unlink()
    again = open_initial(run)
    assert again.model == initial.model and again.chat.name == "template"
    assert again.vocabulary.coder.control == initial.vocabulary.coder.control
    second = _write_run(tmp_path / "second", again, state)
    send_out(second, tmp_path / "back", "float32")
    assert (tmp_path / "back/chat_template.jinja").is_file()
    back = open_checkpoint(tmp_path / "back")
    assert back.model == initial.model and back.family == "deepseek_v3"
    for leaf, want in zip(
        *(jax.tree.leaves(dsjax.load(path, dtype="float32")) for path in (back.path, base)),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, want)


def test_converted_folder_will_do(base, tmp_path):
    bring_in(base, tmp_path / "converted")
    converted, published = open_initial(tmp_path / "converted"), open_initial(base)
    assert converted.model == published.model and converted.chat.name == "R1"
    converted.keep_files(tmp_path)
    kept = {path.name for path in (tmp_path / "hf").iterdir()}
    assert kept == {"config.json", "tokenizer.json"}


def test_a_pretraining_runs_tokenizer_stays_at_the_top(base, state, tmp_path):
    run = _write_run(tmp_path / "run", open_initial(base), state)
    for path in (run / "hf").iterdir():
        path.unlink()
    (run / "hf").rmdir()
    write_checkpoint(run, CONTROL["V3"], tokenizer_config={"bos_token": None})
    initial = open_initial(run)
    (tmp_path / "next").mkdir()
    initial.keep_files(tmp_path / "next")
    kept = {path.name for path in (tmp_path / "next").iterdir()}
    assert kept == {"tokenizer.json", "tokenizer_config.json"}


def test_config_is_filled_from_the_checkpoint(base):
    config = open_initial(base).fill(PostTraining(name="tuned"))
    assert config.init == str(base) and config.shape.n_mtp == 2
    assert json.loads(json.dumps(settings.to_dict(config)))["model"]["n_mtp"] == 2


def test_checkpoint_without_tokenizer_is_refused(base, tmp_path):
    write_hf(tmp_path / "bare")
    (tmp_path / "bare/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"bare has neither tokenizer\.json nor .*copy the one"):
        open_initial(tmp_path / "bare")


def test_another_folders_tokenizer_may_take_the_place_of_the_checkpoints(base, tmp_path):
    other = write_checkpoint(
        tmp_path / "other", CONTROL["V3"], config={"model_type": "llama"}, generation_config={}
    )
    initial = open_initial(base, tokenizer=str(other))
    assert initial.chat.name == "V3" and open_initial(base).chat.name == "R1"
    (tmp_path / "run").mkdir()
    initial.keep_files(tmp_path / "run")
    kept = {path.name for path in (tmp_path / "run/hf").iterdir()}
    assert kept == {"config.json", "tokenizer.json", "generation_config.json"}
    config = json.loads((tmp_path / "run/hf/config.json").read_text())
    assert config["model_type"] == "deepseek_v3"  # the model's own


def test_tokenizer_with_ids_that_the_model_lacks_is_refused(base, tmp_path):
    other = write_checkpoint(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has ids up to 128804, and the model has 272 tokens"):
        open_initial(base, tokenizer=str(other))

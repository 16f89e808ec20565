"""Pre-training that begins with a checkpoint: whose weights, what is new, what is refused."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from dsjax.checkpoint.load import load
from dsjax.config import Config, DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.text.tokenizer import FILE_NAMES
from dsjax.train import pretraining
from dsjax.train.initial import open_initial, state_of
from dsjax.train.optimizer import adamw
from dsjax.train.step import declared_model
from tests.checkpoint.hf_files import plain, write
from tests.golden.cases import V3, V32, Case

CASE = Case(V3 | {"num_hidden_layers": 2}, seed=31)
NOWHERE = Path("no folder of a run")
INDEXER = {key: value for key, value in V32.items() if key.startswith("index_")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("initial") / "hf", CASE.config, plain(CASE))


def config_of(folder, **changes):
    model = dataclasses.replace(load(folder).config, **changes)
    return Config(
        name="x",
        init=str(folder),
        model=model,
        data=DataConfig(sequence_length=32),
        precision=PrecisionConfig(compute="float32"),
    )


def state(config):
    config, checkpoint = open_initial(config, NOWHERE)
    assert checkpoint is not None
    optimizer = adamw(config.optim, pretraining.trained_by(config))
    declared = declared_model(config.model, config.precision)
    return state_of(checkpoint, declared, optimizer, make_mesh({"data": 1}, 1), 7)


def test_state_has_the_checkpoints_weights_and_a_new_indexer(folder):
    made, again = (state(config_of(folder, **INDEXER)) for _ in range(2))
    known = dict(nnx.to_flat_state(nnx.state(load(folder, dtype="float32"))))
    own = nnx.merge_state(made.params, made.router)
    new = []
    for path, variable in nnx.to_flat_state(own):
        if path in known:
            np.testing.assert_array_equal(variable[...], known.pop(path)[...], str(path))
        else:
            new.append(path)
    assert not known and new and all("indexer" in path for path in new)
    weights = made.params["moe_layers"]["attn"]["indexer"]["wk"][...]
    assert 0.5 * 0.006 < np.std(weights) < 2 * 0.006
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_has_no_shape_may_differ(folder):
    """Rope, for a longer context."""
    config = config_of(folder, rope_factor=80.0, max_seq_len=9999)
    assert open_initial(config, NOWHERE)[0].model.rope_factor == 80.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inter_dim": 48}, r"dense_layers\.ffn\.w_gate \[1, 64, 48\], there \[1, 64, 112\]"),
        ({"n_shared_experts": 0}, r"moe_layers\.ffn\.shared\.w_gate .* is left over"),
        ({"n_mtp": 1}, r"mtp\.enorm\.weight \[1, 64\] is new"),
    ],
)
def test_other_shapes_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        open_initial(config_of(folder, **changes), NOWHERE)


@pytest.mark.parametrize("name", FILE_NAMES)
def test_tokenizer_is_the_checkpoints_in_either_form(folder, tmp_path, name):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    (base / name).write_text("")
    config, _ = open_initial(config_of(base), NOWHERE)
    assert config.data.tokenizer == str(base / name)


def test_without_checkpoint_nothing_is_opened(folder):
    config = dataclasses.replace(config_of(folder), init="")
    assert open_initial(config, NOWHERE) == (config, None)


def run(config, where):
    output = io.StringIO()
    code = pretraining.train(config, where, command="x", console=Console(file=output, width=150))
    assert code == 0, output.getvalue()
    lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.heavy
def test_indexer_is_trained_alone_and_then_all_together(tmp_path):
    """V3.2's two stages after a dense run: only the indexer changes in the first, its divergence
    falls; in the second everything does.
    """
    words = "attention latent expert router token balance of the a is".split()
    rng = np.random.default_rng(0)
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(" ".join(rng.choice(words, size=80)))
    dense = Config(
        name="dense",
        model=ModelConfig(
            vocab_size=300, dim=32, n_layers=2, n_dense_layers=2, n_heads=2, inter_dim=48,
            q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
            init_std=0.1, max_seq_len=64,
        ),
        data=DataConfig(
            files=f"{tmp_path}/*.txt", heldout_fraction=0.2, sequence_length=64,
            cache_dir=str(tmp_path / "cache"),
        ),
        train=TrainConfig(
            steps=20, batch_size=8, log_every=5, eval_every=0, sample_tokens=0, tensorboard=False,
        ),
        optim=OptimConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0),
        precision=PrecisionConfig(compute="float32"),
    )  # fmt: skip
    run(dense, tmp_path / "dense")
    indexed = dataclasses.replace(dense.model, index_n_heads=16, index_head_dim=8, index_topk=16)
    warmup = dataclasses.replace(
        dense,
        name="warmup",
        model=indexed,
        init=str(tmp_path / "dense"),
        train=dataclasses.replace(dense.train, steps=40, indexer="warmup"),
    )
    lines = run(warmup, tmp_path / "warmup")
    assert lines[-1]["index_loss"] < 0.8 * lines[0]["index_loss"]
    before, after = (leaves(tmp_path / name) for name in ("dense", "warmup"))
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path], path)
    sparse = dataclasses.replace(
        warmup, name="sparse", init=str(tmp_path / "warmup"), train=dense.train
    )
    lines = run(sparse, tmp_path / "sparse")
    assert "index_loss" in lines[-1]
    for path, value in leaves(tmp_path / "sparse").items():
        assert (value != after[path]).any(), path


def leaves(folder):
    found = jax.tree_util.tree_leaves_with_path(load(folder))
    return {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in found}

"""What is checked and put in place before the first step, and what a checkpoint brings back."""

import contextlib
import dataclasses
import io
import json

import jax
import pytest
from rich.console import Console

from dsjax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from dsjax.display import Display
from dsjax.signals import StopRequest
from dsjax.train import pretraining
from dsjax.train.session import Session
from tests.checkpoint.damage import with_flipped_bit


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("setup")
    for number in range(6):
        text = f"some words to learn from, and {number} more of them. "
        (root / f"{number}.txt").write_text(text * 9)
    return Config(
        name="setup",
        model=ModelConfig(
            vocab_size=300,
            dim=16,
            n_layers=1,
            n_heads=2,
            n_dense_layers=1,
            inter_dim=32,
            attention="gqa",
            max_seq_len=8,
        ),
        data=DataConfig(
            files=f"{root}/*.txt",
            heldout_fraction=0.3,
            sequence_length=8,
            cache_dir=str(root / "cache"),
        ),
        train=TrainConfig(steps=3, batch_size=8, tensorboard=False),
        mesh=MeshConfig(data=2, fsdp=4),
    )


@contextlib.contextmanager
def prepared(config, folder):
    output = io.StringIO()
    display = Display(Console(file=output, width=150))
    with contextlib.closing(Session(config, folder, display, StopRequest())) as session:
        pretraining.Pretraining(config, session)
        yield session, output


def test_prepared_run_is_spread_over_the_mesh(config, tmp_path):
    (tmp_path / "checkpoints" / "7.partial").mkdir(parents=True)  # of a save that was killed
    with prepared(config, tmp_path) as (session, _):
        assert session.step == 0 and list((tmp_path / "checkpoints").iterdir()) == []
        weight = session.state.params["embed"]["weight"].get_value()
        assert weight.addressable_shards[0].data.shape == (300, 4)
        assert (tmp_path / "tokenizer.json").is_file()
        session.compare_replicas()
        norm = session.state.params["norm"]["weight"]
        device = session.mesh.devices.flat[5]
        norm.set_value(with_flipped_bit(norm.get_value(), device, 9))
        with pytest.raises(ValueError, match=rf"after step 0 {device} hold other .*params\.norm"):
            session.compare_replicas()


def test_batch_that_does_not_divide_is_refused_first(config, tmp_path):
    odd = dataclasses.replace(config, train=TrainConfig(steps=3, batch_size=4))
    with (
        pytest.raises(
            ValueError,
            match=r"train\.micro_batch_size.*batch=4.*does not divide over mesh\.data=2 x mesh\.f",
        ),
        prepared(odd, tmp_path),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
def test_restored_run_says_what_changed(config, tmp_path):
    with prepared(config, tmp_path) as (session, _):
        record = {
            "step": 2,
            "tokens": 128,
            "data": {**session.source.state(), "next_row": 16},
            "seconds": 5.0,
            "versions": {"jax": "0.0"},
        }
        session.checkpoints.save(2, session.state, record)
    (tmp_path / "checkpoints" / "3").mkdir()  # what a copy that broke off may leave
    with prepared(config, tmp_path) as (session, output):
        assert session.step == 2 and session.source.state()["next_row"] == 16
        assert session.seconds > 5 and session.meter.whole() is None  # of an older version's record
    assert "after step 2 of 3" in output.getvalue()
    assert "3 is not used (it is now 3.damaged); using step 2" in output.getvalue()
    assert f"jax 0.0 -> {jax.__version__}" in output.getvalue()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"]

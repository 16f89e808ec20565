"""What is checked and put in place before the first step."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from dsjax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from dsjax.display import Display
from dsjax.train import loop, setup
from dsjax.train.signals import StopRequest
from tests.checkpoint.damage import with_flipped_bit


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("setup")
    for number in range(6):
        (root / f"{number}.txt").write_text("some words to learn from, and some more of them. " * 9)
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


def prepare(config, folder):
    output = io.StringIO()
    display = Display(Console(file=output, width=150))
    return setup.prepare(config, folder, display, StopRequest()), output


def close(run):
    run.loader.close()
    run.metrics.close()
    run.checkpoints.close()


def test_prepared_run_is_spread_over_the_mesh(config, tmp_path):
    (tmp_path / "checkpoints" / "7.partial").mkdir(parents=True)  # of a save that was killed
    run, _ = prepare(config, tmp_path)
    try:
        assert run.step == 0 and list((tmp_path / "checkpoints").iterdir()) == []
        weight = run.state.params["embed"]["weight"].get_value()
        assert weight.addressable_shards[0].data.shape == (300, 4)
        batch = run.place({"tokens": np.zeros((1, 8, 9), np.int32)})
        assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(1, 1, 9)}
        assert (tmp_path / "tokenizer.json").is_file()
        loop._compare_replicas(run)
        norm = run.state.params["norm"]["weight"]
        device = run.mesh.devices.flat[5]
        norm.set_value(with_flipped_bit(norm.get_value(), device, 9))
        with pytest.raises(ValueError, match=rf"after step 0 {device} hold other .*params\.norm"):
            loop._compare_replicas(run)
    finally:
        close(run)


def test_batch_that_does_not_divide_is_refused_first(config, tmp_path):
    odd = dataclasses.replace(config, train=TrainConfig(steps=3, batch_size=4))
    with pytest.raises(
        ValueError,
        match=r"train\.micro_batch_size.*batch=4.*does not divide over mesh\.data=2 x mesh\.fsdp=4",
    ):
        prepare(odd, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
def test_restored_run_says_what_changed(config, tmp_path):
    run, _ = prepare(config, tmp_path)
    record = {
        "step": 2,
        "data": {**run.loader.state(), "next_row": 16},
        "seconds": 5.0,
        "versions": {"jax": "0.0"},
    }
    run.checkpoints.save(2, run.state, record)
    close(run)
    (tmp_path / "checkpoints" / "3").mkdir()  # what a copy that broke off may leave
    run, output = prepare(config, tmp_path)
    close(run)
    assert run.step == 2 and run.loader.state()["next_row"] == 16 and run.seconds > 5
    assert "after step 2 of 3" in output.getvalue()
    assert "3 is not used (it is now 3.damaged); using step 2" in output.getvalue()
    assert f"jax 0.0 -> {jax.__version__}" in output.getvalue()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"]

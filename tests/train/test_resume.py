"""A stopped and resumed run ends with the same bits, whatever the model and the mesh."""

import dataclasses
import functools
import hashlib
import io
import json

import pytest
from rich.console import Console

from dsjax.checkpoint import manifest
from dsjax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    TrainConfig,
)
from dsjax.parallel.mesh import make_mesh
from dsjax.signals import StopRequest
from dsjax.train import pretraining
from dsjax.train.throughput import TIMED

SHAPE = {
    "vocab_size": 300,
    "dim": 16,
    "n_layers": 2,
    "n_dense_layers": 1,
    "n_heads": 2,
    "inter_dim": 32,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_seq_len": 16,
    "init_std": 0.05,
}
EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_activated_experts": 2,
    "moe_inter_dim": 8,
    "router_bias": True,
    "norm_topk": True,
}
MODELS = {
    "dense": SHAPE | {"n_dense_layers": 2},
    "moe": SHAPE | EXPERTS | {"q_lora_rank": 8},
    "mtp": SHAPE | EXPERTS | {"n_mtp": 1},
    "fp8": SHAPE | EXPERTS | {"n_mtp": 1},
}
MESHES = {
    "one device": {},
    "fsdp": {"fsdp": 4},
    "expert": {"fsdp": 2, "expert": 2},
    "pipe": {"expert": 2, "pipe": 2, "microbatches": 4},
}


def config_of(model, mesh, root):
    for number in range(20):
        (root / f"{number}.txt").write_text("the latent attention of experts " * (number + 5))
    return Config(
        name=model,
        # A stage has a layer of experts at least.
        model=ModelConfig(**MODELS[model] | ({"n_layers": 3} if mesh == "pipe" else {})),
        data=DataConfig(
            files=f"{root}/*.txt",
            heldout_fraction=0.2,
            sequence_length=16,
            cache_dir=str(root / "cache"),
        ),
        train=TrainConfig(
            steps=5,
            batch_size=8,
            log_every=1,
            eval_every=0,
            eval_sequences=8,
            checkpoint_every=2,
            sample_tokens=0,
            tensorboard=False,
        ),
        optim=OptimConfig(
            learning_rate=1e-2,
            warmup_steps=2,
            moment_dtype="bfloat16",
            ema=0.9 if mesh == "fsdp" else 0.0,
        ),
        precision=PrecisionConfig(compute="float32", fp8="on" if model == "fp8" else "off"),
        mesh=MeshConfig(**{"data": 1} | MESHES[mesh]),
    )


def digest(folder):
    """SHA-256 of all arrays, of the place in the data and of the metrics."""
    newest = manifest.verify(folder / "checkpoints" / "5")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: line[key] for key in line if key not in TIMED} for line in metrics]
    assert {name.split(".")[0] for name in newest.leaves} >= {"params", "optimizer"}
    kept = [newest.leaves, newest.record["data"], newest.record["step"], lines]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def train(config, folder):
    console = Console(file=io.StringIO(), width=150)
    return pretraining.train(config, folder, command="", console=console)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_resumed_run_ends_with_the_same_bits(model, mesh, tmp_path, monkeypatch):
    if model == "dense" and mesh in ("expert", "pipe"):
        pytest.skip("a dense model has nothing to split over experts")
    (tmp_path / "text").mkdir()
    config = config_of(model, mesh, tmp_path / "text")
    devices = 1 if not MESHES[mesh] else 4
    monkeypatch.setattr(pretraining, "make_mesh", functools.partial(make_mesh, n_devices=devices))
    assert train(config, tmp_path / "whole") == 0
    seen = []

    def exit_code(request):
        seen.append(request)
        return 143 if len(seen) >= 4 else None

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "exit_code", property(exit_code))
        assert train(config, tmp_path / "stopped") == 143
    assert train(config, tmp_path / "stopped") == 0
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert train(other, tmp_path / "other") == 0
    assert digest(tmp_path / "other") != digest(tmp_path / "whole")

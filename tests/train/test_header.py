"""What a run says of itself before it compiles."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from dsjax import settings
from dsjax.config import Config
from dsjax.display import size
from dsjax.parallel.mesh import make_mesh
from dsjax.train import header
from dsjax.train.optimizer import adamw
from dsjax.train.step import abstract_state, declared_model

TINY = Path(__file__).parents[2] / "configs/tiny.py"


def prepared(*assignments, sizes):
    config = settings.override(settings.load_config(TINY, Config), assignments)
    declared = declared_model(config.model, config.precision)
    mesh = make_mesh(sizes, n_devices=8 if sizes else 1)
    return config, declared, abstract_state(declared, adamw(config.optim), mesh), mesh


def shown(config, declared, abstract, mesh, *, trains=lambda path: True, **options):
    output = io.StringIO()
    takes = header.sequences(config, 256)
    Console(file=output, width=160).print(
        header.table(
            config, declared, abstract, mesh, optimizer=adamw(config.optim, trains),
            folder=Path("runs/x"), takes=takes, flops_per_token=2e7, **options,
        )
    )  # fmt: skip
    rows = [line.strip().split("  ", 1) for line in output.getvalue().splitlines()]
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def test_header_names_size_cost_devices_and_files():
    one = prepared("train.micro_batch_size=2", sizes={})
    said = shown(*one, tokens=10_000_000)
    assert said["parameters"] == (
        "9,977,600, 4,472,576 of them activated per token, and 1,934,800 in MTP modules"
    )
    assert said["computes in"] == "float32" and said["devices"] == "1 x cpu"
    assert said["a step"] == "8 sequences of 256, 2,048 tokens, in 4 passes"
    assert said["the run"] == "360 steps, 10,000,000 tokens"
    assert said["training"] == "20 MFLOP per token, 200 TFLOP in the run"
    assert said["files"] == "runs/x"
    assert said["memory per device"].startswith("at least ")


def test_memory_is_what_one_device_holds():
    one = prepared(sizes={})[2]
    config, declared, split, mesh = prepared(sizes={"data": 2, "fsdp": 4})
    alone, shared = header.bytes_per_device(one), header.bytes_per_device(split)
    assert set(alone) == {"params", "router", "optimizer"}
    assert alone["params"] == 4 * (9_977_600 + 1_934_800) - alone["router"]
    assert 0.25 <= shared["params"] / alone["params"] < 0.27  # norms are on every device
    said = shown(config, declared, split, mesh)
    assert said["devices"] == "8 x cpu, as mesh data=2 x fsdp=4"
    assert said["the run"] == "360 steps" and "in the run" not in said["training"]


def test_what_is_frozen_has_no_gradients():
    one = prepared(sizes={})
    params = header.bytes_per_device(one[2])["params"]
    assert f"gradients {size(params)}" in shown(*one)["memory per device"]
    head = 4 * math.prod(one[2].params["head"]["weight"].shape)
    said = shown(*one, trains=lambda path: path[0] == "head")["memory per device"]
    assert f"gradients {size(head)}" in said and f"params {size(params)}" in said


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999 "), (1.5e6, "1.5 M"), (2.664e24, "2.66e+06 E"), (1e15, "1 P")]
)
def test_large_numbers_are_scaled(number, text):
    assert header._scaled(number) == text

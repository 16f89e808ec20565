"""What tools/show.py says, and that it needs no device to say it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dsjax import command, settings, show
from dsjax.checkpoint.shape import with_shape
from dsjax.config.roots import ROOTS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def v3():
    return show.summarize(settings.load_config(ROOT / "configs/v3_671b.py"))


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "tools/show.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_summary_of_v3_has_the_published_figures(v3):
    assert v3["total_params"] == 671_026_419_200
    assert v3["activated_params"] == 37_552_297_472
    assert v3["mtp_params"] == 11_610_068_224
    assert v3["kv_cache_bytes_per_token"] == 70_272
    assert v3["train_flops_per_token"]["causal_with_mtp"] == pytest.approx(260.6e9, rel=3e-4)


def test_summary_lists_every_parameter_once(v3):
    paths = [parameter["path"] for parameter in v3["parameters"]]
    assert len(set(paths)) == len(paths) and set(paths) == set(v3["sharding"])
    total = sum(parameter["count"] for parameter in v3["parameters"])
    assert total == v3["total_params"] + v3["mtp_params"]


def test_sharding_follows_the_mesh_of_the_config(v3):
    assert v3["sharding"]["head.weight"] == [["fsdp", "expert"], []]
    config = settings.load_config(ROOT / "configs/v3_671b.py")
    both = show.summarize(settings.override(config, ["mesh.tensor=8"]))
    assert both["sharding"]["head.weight"] == [["fsdp", "expert"], ["tensor"]]
    one = show.summarize(settings.override(config, ["mesh.fsdp=1", "mesh.expert=1"]))
    assert one["sharding"]["head.weight"] == [[], []]


def test_a_mesh_of_known_size_shows_what_each_device_holds(v3):
    assert "shards" not in v3  # mesh.fsdp=-1 is open
    config = settings.load_config(ROOT / "configs/v3_671b.py")
    summary = show.summarize(command.on_mesh(config, {"fsdp": 8, "expert": 64}))
    experts = summary["shards"]["moe_layers.ffn.experts.w_gate"]
    assert experts["shape"] == [58, 256 // 64, 7168 // 8, 2048]
    # float32 weights and two bfloat16 moments are as large as one another
    assert experts["bytes"] == experts["optimizer_bytes"] == 58 * 4 * 896 * 2048 * 4
    assert summary["shards"]["head.weight"]["shape"] == [7168 // 512, 129280]
    assert summary["shards"]["moe_layers.ffn.gate.bias"]["optimizer_bytes"] == 0
    total = sum(shard["bytes"] for shard in summary["shards"].values())
    assert summary["device"]["bytes"] == total

    copies = show.summarize(command.on_mesh(config, {"data": 4, "fsdp": 2, "expert": 64}))
    experts = copies["shards"]["moe_layers.ffn.experts.w_gate"]
    assert experts["shape"] == [58, 4, 7168 // 2, 2048]
    assert experts["optimizer_bytes"] * 4 == experts["bytes"]


def test_a_mesh_that_does_not_divide_is_refused_with_every_parameter_named():
    config = settings.load_config(ROOT / "configs/v3_671b.py")
    with pytest.raises(ValueError) as refused:
        show.summarize(command.on_mesh(config, {"expert": 3}))
    message = str(refused.value)
    assert "moe_layers.ffn.experts.w_gate: dimension experts=256" in message
    assert "head.weight: dimension embed=7168 of shape (7168, 129280)" in message
    assert "does not divide over mesh.expert=3; choose sizes that divide 256" in message


def test_command_prints_the_table_of_a_mesh():
    done = run("configs/tiny.py", "--mesh", "fsdp=2,expert=4,tensor=2", JAX_PLATFORMS="no_such")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "moe_layers.ffn.experts.w_up" in line)
    for expected in ("experts->expert", "expert_embed->fsdp", "ffn->tensor", "4 x 4 x 128 x 64"):
        assert expected in row, row
    assert "bytes of parameters on a device of mesh fsdp=2 x expert=4 x tensor=2" in done.stdout
    refused = run("configs/tiny.py", "--mesh", "experts=2")
    assert refused.returncode == 2 and "'experts=2' does not set one of the axes" in " ".join(
        refused.stderr.split()
    )


def test_command_prints_json_without_any_device():
    done = run("configs/v3_671b.py", "--json", JAX_PLATFORMS="no_such_platform")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total_params"] == 671_026_419_200


def test_an_experiment_that_begins_with_a_checkpoint_takes_its_shape(tmp_path):
    v3 = "--init", "configs/v3_671b.py"
    done = run("configs/r1_zero_v3.py", *v3, "--json", JAX_PLATFORMS="no_such_platform")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["total_params"] == 671_026_419_200
    assert summary["step"]["answers"] == 512 * 16
    assert summary["step"]["answer_tokens_at_most"] == 512 * 16 * 32768
    # float32 masters, two bfloat16 moments, a bfloat16 reference
    device = summary["device"]
    assert device["bytes"] == pytest.approx(5.34e9, rel=0.001)
    assert device["bytes"] == pytest.approx(2 * device["reference_bytes"], rel=1e-4)
    text = run("configs/r1_zero_v3.py", *v3).stdout
    for expected in ("answers per update", "512", "bytes of the reference policy", "max_new_tok"):
        assert expected in text, expected
    bare = run("configs/r1_zero_v3.py")
    assert bare.returncode == 1 and "--init CKPT or, for example, --init configs/" in bare.stderr


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("tiny", {"sequences": 8, "tokens": 8 * 256, "sequences_per_pass": 8}),
        ("dpo_tiny", {"examples": 8, "sequences": 16, "tokens": 16 * 256}),
    ],
)
def test_a_step_is_counted(name, step):
    config = settings.load_any(ROOT / f"configs/{name}.py", ROOTS)
    init = None if name == "tiny" else str(ROOT / "configs/tiny.py")
    found = show.summarize(with_shape(config, init))["step"]
    assert {key: found[key] for key in step} == step


def test_printed_summary_names_totals_and_parameters(v3):
    console = Console(width=140, record=True, file=io.StringIO())
    show.print_summary(v3, console)
    text = console.export_text()
    for expected in (
        "671,026,419,200",
        "weights are [in, out]",
        "moe_layers.ffn.experts.w_gate",
        "58 x 256 x 7168 x 2048",
        "embed->fsdp",
        "260.64 G",
        "decay_points=[0.6756756756756757,",
        "rope_scaling=yarn",
    ):
        assert expected in text, expected


def test_command_names_nearest_config_on_failure():
    done = run("configs/v3_671.py")
    assert done.returncode == 1 and done.stdout == ""
    assert "did you mean configs/v3_671b.py?" in done.stderr

"""The TPU compiler's answers: what is read from them, and (slow) the shipped configs on slices.

The slow tests need the extra `plan`; without it they fail, saying so.
"""

import json
from pathlib import Path

import jax
import pytest

from dsjax import settings
from dsjax.checkpoint.shape import with_shape
from dsjax.config.roots import PLANNED
from dsjax.plan import aot, figures, topology

ROOT = Path(__file__).parents[2]
CASES = json.loads(Path(__file__).with_name("compiled.json").read_text())


@pytest.fixture
def tpu_compiler(monkeypatch):
    """Without what the tests set for a CPU: flags that it ends the process at, and a precision that
    its kernels do not have.
    """
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with jax.default_matmul_precision(None):
        yield


def load(case, *overrides):
    config = settings.load_any(ROOT / "configs" / f"{case['config']}.py", PLANNED)
    config = settings.override(config, [*case["set"], *overrides])
    return with_shape(config, str(ROOT / case["init"]) if "init" in case else None)


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "Ran out of memory in memory space hbm. Used 30.50G of 15.75G hbm. Exceeded",
            30.5 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Used 512.00M of 15.75G hbm.", 2**29),
        (
            "the total memory required for HLO temporaries (87.50G) exceeds available HBM (15.75G)",
            87.5 * 2**30,
        ),
        ("Ran out of memory in memory space vmem. Used 20.1M of 16.0M", None),
    ],
)
def test_memory_that_a_program_wanted_is_read_from_the_refusal(message, wanted):
    assert aot.bytes_wanted(message) == wanted


def test_collectives_are_those_of_the_largest_program_that_was_written(tmp_path):
    assert aot._collectives(tmp_path) == (None, "the compiler has not dumped its program")
    line = "  %x = f32[8]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}\n"
    for name, body in {"0.jit_fill": "", "2.jit_step": line}.items():
        text = f"ENTRY %main (p: f32[4]) -> f32[8] {{\n{body}}}\n"
        (tmp_path / f"module_{name}.after_optimizations.txt").write_text(text)
    found, problem = aot._collectives(tmp_path)
    assert problem is None
    assert [(item.kind, item.bytes) for item in found or ()] == [("all-gather", 16)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_shipped_config_compiles_and_fits(case, tpu_compiler):
    plan = figures.make(load(case), topology.parse(case["topology"]), case["step"], compiled=True)
    print(json.dumps(plan, indent=2))
    assert plan["fits"]
    assert plan["peak_bytes_per_device"] == pytest.approx(case["peak_bytes_per_device"], rel=0.03)
    assert plan["argument_bytes"] == pytest.approx(case["argument_bytes"], rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("mesh", [{"expert": 4}, {"expert": 2, "fsdp": 2}])
def test_step_compiles_where_every_rank_gathers_all_tokens(mesh, remat, tpu_compiler):
    """In bfloat16, whose sums over the rounds of experts the compiler must not find in float32."""
    config = settings.override(
        settings.load_config(ROOT / "configs/tiny.py"),
        [
            "model.n_layers=3",
            "model.n_mtp=0",
            "model.n_activated_experts=4",
            "model.n_limited_groups=4",
            "precision.compute=bfloat16",
            "mesh.data=1",
            *(f"mesh.{axis}={size}" for axis, size in {"fsdp": 1, **mesh}.items()),
            "train.batch_size_start=0",
            "train.batch_ramp_fraction=0",
            "train.micro_batch_size=8",
            f"train.remat={remat}",
        ],
    )
    plan = aot.compile_step(config, topology.parse("v5e:2x2"), "train")
    kinds = {collective.kind for collective in plan.collectives or ()}
    assert {"all-gather", "reduce-scatter"} <= kinds and "ragged-all-to-all" not in kinds


@pytest.mark.slow
def test_slow_code_takes_the_same_memory_and_sends_the_same(tpu_compiler, monkeypatch):
    config = settings.override(
        settings.load_config(ROOT / "configs/r1_distill_qwen_1p5b.py"),
        [
            "model.n_layers=2",
            "model.n_dense_layers=2",
            "model.vocab_size=4096",
            "data.sequence_length=2048",
            "train.batch_size=4",
            "train.micro_batch_size=4",
            "train.remat=full",
        ],
    )
    slow = aot.compile_step(config, topology.parse("v5e:2x2"), "train")
    monkeypatch.setattr(aot, "_SLOW_CODE", {})
    fast = aot.compile_step(config, topology.parse("v5e:2x2"), "train")
    assert slow.collectives and slow.collectives == fast.collectives
    for figure in ("peak_bytes_per_device", "argument_bytes", "temporary_bytes", "output_bytes"):
        assert getattr(slow, figure) == getattr(fast, figure), figure
    assert slow.code_bytes and fast.code_bytes and slow.code_bytes < fast.code_bytes


@pytest.mark.slow
def test_program_does_not_grow_with_layers(tpu_compiler):
    """Twice the layers: the same program before the compiler, and nearly the same time in it."""
    plans = [
        figures.make(
            settings.override(
                settings.load_config(ROOT / "configs/r1_distill_qwen_1p5b.py"),
                [
                    f"model.n_layers={layers}",
                    f"model.n_dense_layers={layers}",
                    "data.sequence_length=2048",
                    "train.batch_size=4",
                    "train.micro_batch_size=4",
                    "train.remat=full",
                ],
            ),
            topology.parse("v5e:2x2"),
            "train",
            compiled=True,
        )
        for layers in (14, 28)
    ]
    assert plans[1]["program_text_bytes"] < 1.01 * plans[0]["program_text_bytes"]
    assert plans[1]["code_bytes"] < 1.05 * plans[0]["code_bytes"]
    assert plans[1]["compile_cpu_seconds"] < 1.3 * plans[0]["compile_cpu_seconds"]
    assert jax.default_backend() == "cpu"

"""The plan of a step: figures that fit together, and tables that say them."""

from pathlib import Path

import pytest
from rich.console import Console

from dsjax import settings
from dsjax.checkpoint.shape import with_shape
from dsjax.config.roots import ROOTS
from dsjax.plan import aot, figures, topology
from dsjax.plan.collectives import Collective

ROOT = Path(__file__).parents[2]
TINY = settings.load_config(ROOT / "configs/tiny.py")
SLICE = topology.parse("v5e:2x4")
COMPILED = aot.CompilerFigures(
    fits=True, peak_bytes_per_device=31, argument_bytes=10, program_flops=4e12,
    compile_seconds=7.0, compile_cpu_seconds=9.0, program_text_bytes=100, temporary_bytes=20,
    output_bytes=1, code_bytes=5, collectives=[Collective("all-gather", 3, 4_500_000_000)],
    collectives_error=None,
)  # fmt: skip


def printed(plan):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    figures.print_plan(plan, console)
    console.file.close()
    return console.export_text()


@pytest.fixture
def answer(monkeypatch):
    def give(compiled):
        monkeypatch.setattr(aot, "compile_step", lambda *_: compiled)
        return figures.make(TINY, SLICE, "train", compiled=True)

    return give


def test_plan_holds_what_the_compiler_says(answer):
    plan = answer(COMPILED)
    assert plan["fits"] and plan["peak_bytes_per_device"] == 31
    assert plan["network_bytes_per_device"] == 4_500_000_000
    assert plan["roofline"]["network_seconds"] == pytest.approx(4.5e9 / 180e9)
    assert plan["model_flops"] > 0 and plan["compile_seconds"] == 7.0
    text = printed(plan)
    assert "train step on v5e:2x4, 8 devices (data=8), compiled" in text
    for said in ("fits", "all-gather", "4.50 GB", "compilation", "7.00 s"):
        assert said in text, said


def test_plan_of_what_does_not_fit_says_so(answer):
    plan = answer(aot.CompilerFigures(False, 31 * 10**9, *COMPILED[2:7]))
    assert plan["network_bytes_per_device"] is None
    text = printed(plan)
    assert "DOES NOT FIT" in text and "collectives: the program does not fit" in text


@pytest.mark.parametrize("step", ["train", "decode"])
def test_estimated_plan_needs_no_compiler(step):
    plan = figures.make(TINY, SLICE, step, compiled=False)
    assert plan["fits"] and not plan["compiled"] and plan["step"] == step
    assert plan["peak_bytes_per_device"] == sum(plan["estimated_parts"].values())
    assert f"{step} step on v5e:2x4, 8 devices (data=8), estimated" in printed(plan)


def test_a_step_of_several_programs_has_the_figures_of_each():
    config = settings.load_any(ROOT / "configs/grpo_countdown.py", ROOTS)
    config = settings.override(config, ["train.batch_size=8"])
    config = with_shape(config, str(ROOT / "configs/tiny.py"))
    plan = figures.of_step(config, SLICE, None, compiled=False)
    assert [other["step"] for other in plan["others"]] == ["score", "decode"]
    for each in (plan, *plan["others"]):
        parts = each["estimated_parts"]
        assert each["peak_bytes_per_device"] == sum(parts.values())
        assert each["beside_bytes"] == parts.get("arrays beside the program", 0)
        assert each["program_flops"] >= each["model_flops"] > 0
    assert plan["model_flops"] == 3 * plan["others"][0]["model_flops"]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    figures.print_step(plan, console)
    console.file.close()
    text = console.export_text()
    for step in ("train", "score", "decode"):
        assert f"grpo_countdown: {step} step on v5e:2x4" in text
    alone = figures.of_step(config, SLICE, "score", compiled=False)
    assert alone == plan["others"][0]

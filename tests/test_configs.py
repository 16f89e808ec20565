"""Every shipped experiment resolves, documents itself, and keeps what its docstring says."""

import ast
import re
from pathlib import Path

import pytest

from dsjax import settings
from dsjax.config import Config
from dsjax.config.finetuning import FineTuning
from dsjax.config.janus import Janus
from dsjax.config.preference import Preference
from dsjax.config.reinforcement import Reinforcement

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "configs").glob("*.py"))
NAMES = [path.stem for path in PATHS]
# The root that each tool reads; a config's docstring names its tool.
ROOTS = {"train": Config, "sft": FineTuning, "prefer": Preference, "grpo": Reinforcement}
ROOTS |= {"paint": Janus}
RELEASED = {
    "llm_7b", "llm_67b", "moe_2b", "moe_16b", "moe_145b", "v2_lite", "v2_236b", "v3_671b",
    "v3_2_671b", "r1_distill_qwen_1p5b", "r1_distill_qwen_7b", "r1_distill_qwen_14b",
    "r1_distill_qwen_32b", "r1_distill_llama_8b", "r1_distill_llama_70b", "r1_0528_qwen3_8b",
}  # fmt: skip


def test_configs_cover_the_family():
    assert set(NAMES) >= RELEASED | {"tiny", "small"}


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def root(path):
    found = re.search(r"Command: python tools/(\w+)\.py", docstring(path))
    assert found, f"{path.name} names no tool"
    return ROOTS[found.group(1)]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_config_resolves_under_its_own_name(path):
    config = settings.load_config(path, root(path))
    assert config.name == path.stem
    assert settings.from_dict(settings.to_dict(config), kind=root(path)) == config


@pytest.mark.parametrize("path", [path for path in PATHS if root(path) is Janus])
def test_rows_that_see_and_draw_divide_over_a_slice_of_four(path):
    config = settings.load_config(path, Janus)
    assert config.micro_batch_size % 4 == 0


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_config_docstring_has_command_hardware_cost_expected(path):
    text = docstring(path)
    headings = [
        line.partition(":")[0] for line in text.splitlines() if re.match(r"[A-Z]\w+:", line)
    ]
    wanted = ["Command", "Hardware", "Cost", "Expected"]
    assert [heading for heading in headings if heading in wanted] == wanted


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_config_command_is_runnable(path):
    """The command names this file, and its overrides are keys of the config with fitting values."""
    match = re.search(r"Command: (.*?)\nHardware:", docstring(path), re.DOTALL)
    assert match
    words = match.group(1).replace("\\\n", " ").split()
    assert words[0] == "python" and words[2] == f"configs/{path.name}"
    assert (ROOT / words[1]).is_file()
    del words[:3]
    assert root(path) is Config or words[0] == "--init"
    if words[0] == "--init":
        del words[:2]
    assert words[0] == "--workdir" and words[1].startswith("runs/")
    assert words[2:3] in ([], ["--set"])
    settings.override(settings.load_config(path, root(path)), words[3:])


@pytest.mark.parametrize("name", sorted(RELEASED - {"moe_2b"}))
def test_config_length_gives_the_published_tokens(name):
    """Steps times batch times sequence, with the ramp, to one percent."""
    tokens = {
        "llm_7b": 2e12, "llm_67b": 2e12, "moe_16b": 2e12, "moe_145b": 245e9, "v2_lite": 5.7e12,
        "v2_236b": 8.1e12, "v3_671b": 14.8e12, "v3_2_671b": 943.7e9,
    }.get(name, 2 * 804_745 * 5_355)  # fmt: skip
    config = settings.load_config(ROOT / f"configs/{name}.py")
    train = config.train
    ramp = train.steps * train.batch_ramp_fraction
    sequences = (train.steps - ramp) * train.batch_size
    sequences += ramp * (train.batch_size + train.batch_size_start) / 2
    assert sequences * config.data.sequence_length == pytest.approx(tokens, rel=0.01)


def test_tiny_and_small_have_every_v3_mechanism():
    for name in ("tiny", "small"):
        config = settings.load_config(ROOT / f"configs/{name}.py")
        model = config.model
        assert model.attention == "mla" and model.q_lora_rank > 0
        assert 0 < model.n_dense_layers < model.n_layers
        assert model.n_shared_experts and model.router_bias and model.norm_topk and model.n_mtp
        assert (model.score_func, model.group_score, model.route_scale) == ("sigmoid", "top2", 2.5)
        assert 1 < model.n_limited_groups < model.n_expert_groups
        assert config.train.bias_update_speed > 0 and config.train.sequence_balance > 0
        assert config.optim.schedule == "v3" and config.data.fim_rate > 0


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("qwen_1_5b", 1e-4), ("qwen_7b", 8e-5), ("qwen_14b", 7e-5), ("qwen_32b", 6e-5),
        ("llama_8b", 5e-5), ("llama_70b", 2e-5), ("qwen3_8b", 8e-5),
    ],
)  # fmt: skip
def test_students_have_their_published_recipe(name, rate):
    config = settings.load_config(ROOT / f"configs/distill_{name}.py", FineTuning)
    assert (config.optim.learning_rate, config.optim.schedule) == (rate, "cosine")
    assert (config.optim.final_ratio, config.train.batch_size) == (0.1, 64)
    assert (config.sft.sequence_length, config.sft.epochs) == (32768, 2)

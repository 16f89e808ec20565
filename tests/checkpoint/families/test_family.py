"""What families share: a family inside another, what is left behind by tools, the choice of one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.checkpoint import families, names
from dsjax.checkpoint.families.family import Family
from dsjax.checkpoint.families.llama import LLAMA
from dsjax.checkpoint.hf_config import from_hf, to_hf
from dsjax.checkpoint.hf_folder import open_hf
from tests.checkpoint import conversions
from tests.checkpoint.families.published import LEFT_BEHIND, RELEASES
from tests.checkpoint.hf_files import plain, write
from tests.golden.cases import CASES

# A made-up model of pictures and text, whose language model is a Llama.
NESTED = dataclasses.replace(
    LLAMA,
    name="picture_llama",
    architecture="PictureLlamaForCausalLM",
    section="language_config",
    prefix="language.",
    neutral=frozenset({"vision_config"}),
)


@pytest.fixture
def nested(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, NESTED.name, NESTED)
    text = CASES["llama"].config
    return {
        "model_type": NESTED.name,
        "architectures": [NESTED.architecture],
        "vision_config": {"layers": 3},
        "language_config": text,
    }


def test_language_model_inside_another_is_read(nested):
    text = CASES["llama"].config
    model = from_hf(nested)
    assert model == from_hf(text)
    written = to_hf(model, NESTED.name)
    assert from_hf(written) == model and written["language_config"]["hidden_size"] == 64
    assert "hidden_size" not in written
    inner = [row.name for row in names.tensors(model, "llama")]
    assert [row.name for row in names.tensors(model, NESTED.name)] == [
        f"language.{name}" for name in inner
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"language_config": None}, r"config\.json\.language_config=None is not an object"),
        ({"audio_config": {"layers": 1}}, r"config\.json has audio_config, unknown here"),
        (
            {"language_config": CASES["llama"].config | {"mlp_bias": True}},
            r"config\.json\.language_config\.mlp_bias=True is not supported",
        ),
        (
            {"language_config": CASES["llama"].config | {"rope_theta": "x"}},
            r"config\.json\.language_config\.rope_theta='x' is not a number",
        ),
    ],
)
def test_problem_inside_another_is_named_with_its_place(nested, change, message):
    with pytest.raises(ValueError, match=message):
        from_hf(nested | change)


def test_language_model_inside_another_is_loaded_and_converted(nested, tmp_path):
    case = CASES["llama"]
    tensors = {f"language.{name}": value for name, value in plain(case).items()}
    folder = write(tmp_path / "nested", nested, tensors)
    want = dsjax.load(write(tmp_path / "plain", case.config, plain(case)))
    ids = jnp.arange(8)[None]
    np.testing.assert_array_equal(dsjax.load(folder)(ids), want(ids))
    conversions.bring_in(folder, tmp_path / "converted")
    conversions.send_out(tmp_path / "converted", tmp_path / "back")
    assert {row.tensor.name for row in open_hf(tmp_path / "back").rows} == tensors.keys()


@pytest.mark.parametrize("release", RELEASES)
def test_what_tools_leave_behind_changes_nothing(release):
    config = RELEASES[release]
    assert from_hf(config | LEFT_BEHIND) == from_hf(config)
    assert from_hf(LEFT_BEHIND | config) == from_hf(config)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("switch", ["use_mrope", "use_qk_norm", "logit_scale"])
def test_unknown_switch_that_is_on_is_refused(release, switch):
    with pytest.raises(ValueError, match=rf"config\.json has {switch}, unknown here"):
        from_hf(RELEASES[release] | {switch: True})


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("switch", ["is_causal", "use_rope"])
def test_switch_that_false_turns_is_refused(release, switch):
    with pytest.raises(ValueError, match=rf"{switch}=False is not supported, only True"):
        from_hf(RELEASES[release] | {switch: False})


def test_advice_leaves_the_file_alone():
    with pytest.raises(
        ValueError, match=r"--override FIELD=VALUE uses it and leaves the file as it is"
    ):
        from_hf(RELEASES["v3"] | {"surprise": 1})


def test_family_is_the_first_that_names_the_tensors():
    chosen = {name: families.family_for(from_hf(config)) for name, config in RELEASES.items()}
    wanted = {name: config["model_type"] for name, config in RELEASES.items()}
    assert chosen == wanted | {"kimi_k2": "deepseek_v3"}
    no_name = dataclasses.replace(from_hf(RELEASES["moe_16b"]), qkv_bias=True)
    assert families.family_for(no_name) == "deepseek"


def test_each_family_names_its_own_releases():
    for config in RELEASES.values():
        family: Family = families.find(config["model_type"])
        assert family.names(from_hf(config))

"""JanusFlow's layout: totals of the release from config.json alone."""

import copy
import math

import jax.numpy as jnp
import pytest

from dsjax.checkpoint import names
from dsjax.checkpoint.families.janusflow import parts
from dsjax.checkpoint.hf_config import from_hf, to_hf, vision_of
from dsjax.config.vision import FlowConfig
from dsjax.model.parameters import declarations
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes
from tests.checkpoint.families.test_multi_modality import JANUS_1B


def section(cls, kind, **params):
    return {"cls": cls, "model_type": kind, "params": params}


SHAPE = {"block_out_channels": [768], "hidden_size": 2048, "layers_in_middle": 2, "norm_eps": 1e-6}
RELEASED = {
    **{key: JANUS_1B[key] for key in ("architectures", "model_type", "torch_dtype")},
    "language_config": JANUS_1B["language_config"],
    "vision_und_enc_config": JANUS_1B["vision_config"] | {"model_type": "vision_und_enc"},
    "vision_gen_enc_config": section(
        "ShallowUViTEncoder", "vision_gen_enc", **SHAPE, input_channels=4, kernel_size=2, stride=2,
        padding=0, use_bias=True, use_mid_block=True, elementwise_affine=True, dropout=0.0,
    ),
    "vision_gen_dec_config": section(
        "ShallowUViTDecoder", "vision_gen_dec", **SHAPE, in_channels=768, out_channels=4,
        upsamples=1,
    ),
}  # fmt: skip


def test_totals_are_exact():
    language = list(names.tensors(from_hf(RELEASED), "multi_modality"))
    beside = list(parts(vision_of(RELEASED)))
    assert len(language) + len(beside) == 587
    total = sum(math.prod(row.shape) for row in language)
    assert total == 1_652_656_128
    of = {}
    for part in beside:
        first = part.name.split(".")[0]
        of[first] = of.get(first, 0) + part.n_parameters
    assert of == {
        "vision_und_enc_model": 316_283_904,
        "vision_und_enc_aligner": 2_099_200,
        "beg_of_und_embed": 2_048,
        "vision_gen_enc_model": 21_614_336,
        "vision_gen_enc_aligner": 1_574_912,
        "vision_gen_dec_model": 50_561_296,
        "vision_gen_dec_aligner_norm": 2_048,
        "vision_gen_dec_aligner": 1_573_632,
    }
    assert total + sum(of.values()) == 2_046_367_504


def test_the_module_has_the_parameters_that_are_named():
    vision = vision_of(RELEASED)
    assert vision and vision.flow == FlowConfig()
    declared = {each.path: each for each in declarations(Eyes(vision, Policy(jnp.float32)))}
    named = {}
    for part in parts(vision):
        path = ".".join(part.path)
        named[path] = named.get(path, 0) + part.n_parameters
    assert named == {path: each.count for path, each in declared.items()}


def test_config_is_written_and_read_again():
    model, vision = from_hf(RELEASED), vision_of(RELEASED)
    again = to_hf(model, "multi_modality", vision=vision)
    assert from_hf(again) == model and vision_of(again) == vision
    unread = {"use_bias", "use_mid_block", "elementwise_affine", "dropout"}
    for name in RELEASED.keys() - {"language_config", "torch_dtype"}:
        want = RELEASED[name]
        if isinstance(want, dict):
            kept = {key: value for key, value in want["params"].items() if key not in unread}
            want = want | {"params": kept}
        assert again[name] == want, name


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("vision_gen_enc_config", {"stride": None}, "stride=4 is not supported, only 2"),
        ("vision_gen_enc_config", {"padding": 1}, "padding=1 is not supported, only 0"),
        ("vision_gen_enc_config", {"hidden_size": 64}, "hidden_size=64 is not supported"),
        ("vision_gen_enc_config", {"use_mid_block": False}, "use_mid_block=False"),
        ("vision_gen_enc_config", {"block_out_channels": [8, 16]}, "not a list of one integer"),
        ("vision_gen_enc_config", {"flux": 1}, "has flux"),
        ("vision_gen_dec_config", {"in_channels": 64}, "in_channels=64 is not supported, only 768"),
        ("vision_gen_dec_config", {"out_channels": 3}, "out_channels=3 is not supported, only 4"),
        ("vision_gen_dec_config", {"upsamples": 2}, "upsamples=2 is not supported, only 1"),
        ("vision_und_enc_config", {"select_layer": 25}, "names none of 24 layers"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(section, changes, said):
    config = copy.deepcopy(RELEASED)
    config[section]["params"] |= changes
    with pytest.raises(ValueError) as caught:
        from_hf(config)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["vision_gen_enc_config", "vision_gen_dec_config"])
def test_what_deepseeks_code_takes_where_nothing_is_said_is_not_ours(name):
    """Its defaults are another shape: a section that says nothing is not JanusFlow's."""
    config = copy.deepcopy(RELEASED)
    config[name]["params"] = {}
    with pytest.raises(ValueError, match="is not supported"):
        from_hf(config)


def test_a_section_that_is_missing_is_named():
    config = copy.deepcopy(RELEASED)
    del config["vision_gen_dec_config"]
    with pytest.raises(ValueError, match="vision_gen_dec_config=None is not an object"):
        from_hf(config)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rms_norm_eps", {}, r"language_config.rms_norm_eps=\{\} is not a number"),
        ("rms_norm_eps", "x", r"language_config.rms_norm_eps='x' is not a number"),
        ("hidden_size", [], r"language_config.hidden_size=\[\] is not an integer"),
    ],
)
def test_what_is_also_the_language_models_is_refused_by_name_and_once(name, value, said):
    config = copy.deepcopy(RELEASED)
    config["language_config"][name] = value
    for section in ("vision_gen_enc_config", "vision_gen_dec_config"):
        config[section]["params"].pop("hidden_size", None)
    with pytest.raises(ValueError, match=said) as caught:
        from_hf(config)
    assert str(caught.value).count(f"language_config.{name}=") == 1

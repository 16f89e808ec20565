"""DeepSeek's own layout: totals of the releases from config.json alone."""

import copy
import math

import jax.numpy as jnp
import pytest

from dsjax.checkpoint import inspection, names
from dsjax.checkpoint.families import family_for, find, naming
from dsjax.checkpoint.families.multi_modality import parts
from dsjax.checkpoint.hf_config import from_hf, to_hf, vision_of
from dsjax.config.vision import SiglipConfig, VisionConfig
from dsjax.files import write_json
from dsjax.model.parameters import declarations
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes
from tests.vision import toy


def released(dim, inter_dim, n_layers, n_heads, *, draws=True):
    """config.json as DeepSeek publishes it."""

    def section(cls, kind, **params):
        return {"cls": cls, "model_type": kind, "params": params}

    def aligner(kind, width):
        return section(
            "MlpProjector", kind, depth=2, input_dim=width, n_embed=dim, projector_type="mlp_gelu"
        )

    config = {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "aligner_config": aligner("aligner", 1024),
        "vision_config": section(
            "CLIPVisionTower",
            "vision",
            image_size=384,
            model_name="siglip_large_patch16_384",
            select_feature="same",
            select_layer=-1,
        ),
        "language_config": {
            "hidden_size": dim,
            "intermediate_size": inter_dim,
            "max_position_embeddings": 16384,
            "model_type": "llama",
            "num_attention_heads": n_heads,
            "num_hidden_layers": n_layers,
            "num_key_value_heads": n_heads,
            "torch_dtype": "bfloat16",
            "vocab_size": 102400,
        },
    }
    if draws:
        config |= {
            "gen_aligner_config": aligner("gen_aligner", 8),
            "gen_head_config": section(
                "vision_head",
                "gen_head",
                image_token_embed=dim,
                image_token_size=16384,
                n_embed=dim,
            ),
            "gen_vision_config": section("VQ-16", "gen_vision", image_token_size=16384, n_embed=8),
        }
    return config


JANUS_1B = released(2048, 5632, 24, 16)
JANUS_7B = released(4096, 11008, 30, 32)
VL_1B = released(2048, 5632, 24, 16, draws=False)


def counted(config):
    """Tensors and parameters of both parts."""
    language = list(names.tensors(from_hf(config), "multi_modality"))
    vision = vision_of(config)
    assert vision
    beside = list(parts(vision))
    total = sum(math.prod(row.shape) for row in language)
    return len(language) + len(beside), total + sum(
        part.n_parameters for part in beside if part.counts
    )


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (JANUS_1B, 882, 2_089_232_011),
        (JANUS_7B, 936, 7_420_368_523),
        (VL_1B, 529, 1_975_235_584),
    ],
)
def test_totals_are_exact(config, tensors, parameters):
    assert counted(config) == (tensors, parameters)


def test_the_module_has_the_parameters_that_are_named():
    vision = vision_of(JANUS_1B)
    assert vision
    declared = {each.path: each for each in declarations(Eyes(vision, Policy(jnp.float32)))}
    named = {}
    for part in parts(vision):
        path = ".".join(part.path)
        named[path] = named.get(path, 0) + part.n_parameters
    assert named == {path: each.count for path, each in declared.items()}
    assert sum(named.values()) - 65_536 == 2_089_232_011 - 1_652_656_128


def test_what_sees_and_draws_is_counted_apart(tmp_path):
    write_json(tmp_path / "config.json", JANUS_1B)
    summary = inspection.summarize(tmp_path, expect=True)
    assert summary["total_params"] == 2_089_232_011
    assert summary["vision_params"] == 2_089_232_011 - 1_652_656_128


def test_the_language_model_has_llamas_defaults():
    model = from_hf(JANUS_1B)
    assert (model.norm_eps, model.rope_theta, model.tie_embed) == (1e-6, 10000.0, False)


@pytest.mark.parametrize(("chosen", "layers"), [(-1, 24), (-2, 23), (2, 2)])
def test_the_last_layer_is_chosen(chosen, layers):
    config = copy.deepcopy(VL_1B)
    config["vision_config"]["params"]["select_layer"] = chosen
    vision = vision_of(config)
    assert vision and vision.tower.n_layers == layers


@pytest.mark.parametrize("config", [JANUS_1B, VL_1B])
def test_config_is_written_and_read_again(config):
    model, vision = from_hf(config), vision_of(config)
    again = to_hf(model, "multi_modality", vision=vision)
    assert from_hf(again) == model and vision_of(again) == vision
    for name in config.keys() - {"language_config", "transformers_version", "torch_dtype"}:
        assert again[name] == config[name], name


def test_a_tower_of_another_shape_cannot_be_written():
    for tower, said in (
        (SiglipConfig(dim=512, pool=True), "cannot hold this model"),
        (SiglipConfig(activation="gelu_tanh", pool=True), "cannot say"),
    ):
        with pytest.raises(ValueError, match=said):
            to_hf(toy.LANGUAGE, "multi_modality", vision=VisionConfig(dim=32, tower=tower))
    with pytest.raises(ValueError, match="whose models see"):
        to_hf(toy.LANGUAGE, "multi_modality")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("vision_config", "cls"), "Tower", "is not supported, only 'CLIPVisionTower'"),
        (("vision_config", "cls"), "HybridVisionTower", "gen_head_config beside two towers"),
        (("vision_config", "params", "select_layer"), 25, "names none of 24 layers"),
        (("vision_config", "params", "model_name"), "sam_b", "model_name='sam_b'"),
        (("aligner_config", "params", "n_embed"), 7, "n_embed=7 is not supported, only 2048"),
        (("gen_head_config", "params", "image_token_size"), 9, "image_token_size=9"),
        (("vision_config",), None, "vision_config=None is not an object"),
        (
            ("vision_gen_enc_config",),
            {"cls": "ShallowUViTEncoder"},
            "gen_head_config beside sections of JanusFlow",
        ),
        (("gen_vision_config", "params", "ch_mult"), [1], "has ch_mult"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(place, value, said):
    config = copy.deepcopy(JANUS_1B)
    inner = config
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(ValueError) as caught:
        from_hf(config)
    assert said in str(caught.value)


def test_a_family_that_sees_is_not_chosen_for_a_language_model():
    assert family_for(toy.LANGUAGE) == "llama"
    assert not {"janus", "multi_modality"} & set(naming(toy.LANGUAGE))
    assert find("janus").sight

import copy
import dataclasses

import pytest

from dsjax.checkpoint.families.janus import parts
from dsjax.checkpoint.hf_config import from_hf, to_hf, vision_of
from tests.checkpoint.broken_rules import refused
from tests.vision import toy

CONFIG = to_hf(toy.LANGUAGE, "janus", dtype="float32", vision=toy.VISION)


def test_config_is_written_and_read_again():
    assert from_hf(CONFIG) == toy.LANGUAGE and vision_of(CONFIG) == toy.VISION
    assert CONFIG["text_config"]["model_type"] == "llama"
    assert "tie_word_embeddings" not in CONFIG["text_config"]


def test_what_no_release_has_is_written_and_read_again():
    vq = dataclasses.replace(toy.VISION.vq, n_groups=8)
    vision = dataclasses.replace(toy.VISION, vq=vq, drawn=7)
    written = to_hf(toy.LANGUAGE, "janus", dtype="float32", vision=vision)
    assert vision_of(written) == vision
    assert written["vq_config"]["num_patches"] == 7
    assert "norm_num_groups" not in CONFIG["vq_config"]


def test_absent_fields_have_transformers_defaults():
    vision = vision_of({"model_type": "janus", "vision_config": {}, "vq_config": {}})
    assert vision and vision.tower.n_tokens == 576 and vision.image_token == 100581
    assert vision.vq and vision.vq.multipliers == (1, 1, 2, 2, 4) and not vision.vq.usage
    shapes = {part.name: part.shape for part in parts(vision)}
    assert shapes["model.generation_head.vision_head.weight"] == (16384, 2048)
    assert len(shapes) == 882 - 219 - 13 - 1 + 4 * 24  # no pooling head; q, k, v apart


def test_broken_rules_name_the_fields_of_the_file():
    wanted = {
        f"vision_config.{name}" for name in ("hidden_size", "patch_size", "mlp_ratio", "depth")
    }
    wanted |= {f"vq_config.{name}" for name in ("base_channels", "num_res_blocks", "embed_dim")}
    assert wanted | {"text_config.num_attention_heads"} <= refused(CONFIG)


def test_a_model_is_tied_unless_the_config_says_otherwise():
    config = copy.deepcopy(CONFIG)
    assert not from_hf(config).tie_embed
    del config["tie_word_embeddings"]
    assert from_hf(config).tie_embed


@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        ("vision_config", "use_qk_norm", True, "use_qk_norm=True is not supported"),
        ("vision_config", "attention_bias", False, "attention_bias=False is not supported"),
        ("vision_config", "hidden_act", "relu", "hidden_act='relu' is not supported"),
        ("vision_config", "hidden_act", {"x": 1}, "hidden_act={'x': 1} is not supported"),
        ("vision_config", "windows", 4, "has windows"),
        ("vision_config", "mlp_ratio", 1e308, "mlp_ratio times 16 exceeds 2,147,483,647"),
        (
            "vision_config",
            "num_hidden_layers",
            2**31 - 1,
            "vision_config.num_hidden_layers=2147483647 exceeds",
        ),
        ("vq_config", "double_latent", True, "double_latent=True is not supported"),
        ("vq_config", "projection_dim", 7, "projection_dim=7 is not supported, only 32"),
        ("vq_config", "channel_multiplier", "x", "is not a list of integers"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(section, name, value, said):
    config = copy.deepcopy(CONFIG)
    config[section][name] = value
    with pytest.raises(ValueError) as caught:
        from_hf(config)
    assert said in str(caught.value)

"""An experiment takes its model from what names one, without weights."""

from pathlib import Path

import pytest

from dsjax import settings
from dsjax.checkpoint.hf_config import to_hf, vision_of
from dsjax.checkpoint.shape import model_of, with_shape
from dsjax.config.finetuning import FineTuning
from dsjax.config.janus import Janus
from dsjax.config.posttraining import TuningConfig
from dsjax.config.shapes import V2_LITE, V3
from dsjax.files import write_json
from tests.checkpoint.families.test_multi_modality import JANUS_1B

CONFIGS = Path(__file__).parents[2] / "configs"
BARE = FineTuning(name="tuned")


def test_a_config_json_of_hugging_face_is_enough(tmp_path):
    write_json(tmp_path / "config.json", to_hf(V3, "deepseek_v3"))
    for path in (tmp_path, tmp_path / "config.json"):
        assert model_of(path) == V3
    filled = with_shape(BARE, str(tmp_path))
    assert (filled.model, filled.init) == (V3, str(tmp_path))


def test_a_run_of_any_kind_tells_its_model(tmp_path):
    run = with_shape(BARE, str(CONFIGS / "v2_lite.py"))
    write_json(tmp_path / "config.json", settings.to_dict(run))
    assert model_of(tmp_path) == V2_LITE
    assert with_shape(run, None) is run
    assert with_shape(run, str(CONFIGS / "v3_671b.py")).model == V3


def test_what_pre_trains_has_a_model_already():
    config = settings.load_config(CONFIGS / "tiny.py")
    assert with_shape(config, None) is config
    with pytest.raises(ValueError, match="tiny pre-trains a model of its own; leave --init out"):
        with_shape(config, "base")


def test_a_model_that_sees_tells_what_it_sees_with(tmp_path):
    write_json(tmp_path / "config.json", JANUS_1B)
    filled = with_shape(Janus(name="x", train=TuningConfig(batch_size=4)), str(tmp_path))
    assert filled.vision == vision_of(JANUS_1B) and filled.shape.dim == 2048
    assert with_shape(filled, None) is filled
    for init in (tmp_path / "plain", CONFIGS / "v3_671b.py"):
        if not init.suffix:
            init.mkdir()
            write_json(init / "config.json", to_hf(V3, "deepseek_v3"))
        with pytest.raises(ValueError, match="is not the folder of a model that sees; name one of"):
            with_shape(filled, str(init))


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (None, r"tuned takes its model from .*: --init CKPT or, for example, --init configs/"),
        ("nowhere", "nowhere does not exist"),
        (str(CONFIGS / "sft_tiny.py"), "takes its own model from a checkpoint; name a pre-train"),
    ],
)
def test_what_names_no_model_is_refused(init, message):
    with pytest.raises(ValueError, match=message):
        with_shape(BARE, init)


def test_rules_between_config_and_model_hold():
    config = settings.override(BARE, ["sft.sequence_length=200000"])
    with pytest.raises(ValueError, match="exceeds the checkpoint's max_seq_len=163840"):
        with_shape(config, str(CONFIGS / "v3_671b.py"))

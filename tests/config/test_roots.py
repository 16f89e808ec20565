"""What commands read of every experiment, whatever its root."""

from pathlib import Path

import pytest

from dsjax import settings
from dsjax.config.roots import ROOTS
from dsjax.config.shapes import V3

CONFIGS = Path(__file__).parents[2] / "configs"
LENGTHS = {"v3_671b": 4096, "sft_tiny": 256, "dpo_tiny": 256, "r1_zero_v3": 36864}


@pytest.mark.parametrize("name", LENGTHS)
def test_every_root_has_a_length_and_a_micro_batch(name):
    config = settings.load_any(CONFIGS / f"{name}.py", ROOTS)
    assert (config.name, config.sequence_length) == (name, LENGTHS[name])
    assert 0 < config.micro_batch_size <= config.train.batch_size


def test_an_open_length_of_answers_is_that_of_the_longest():
    config = settings.load_any(CONFIGS / "r1_zero_v3.py", ROOTS)
    config = settings.override(config, ["rl.sequence_length=0"])
    assert config.sequence_length == 32768


def test_the_shape_of_pre_training_is_its_own():
    assert settings.load_any(CONFIGS / "v3_671b.py", ROOTS).shape == V3

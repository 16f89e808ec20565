"""Each kind of experiment has the programs that its training step runs."""

from pathlib import Path

import pytest

from dsjax import settings
from dsjax.checkpoint.shape import with_shape
from dsjax.config.roots import ROOTS
from dsjax.kernels.target import Target
from dsjax.parallel.mesh import describe_mesh
from dsjax.plan import steps

CONFIGS = Path(__file__).parents[2] / "configs"
WANTED = {
    "tiny": ["train"],
    "sft_tiny": ["train"],
    "dpo_tiny": ["train"],
    "grpo_countdown": ["train", "score", "decode"],
}


def load(name):
    config = settings.load_any(CONFIGS / f"{name}.py", ROOTS)
    return with_shape(config, None if name == "tiny" else str(CONFIGS / "tiny.py"))


@pytest.mark.parametrize("name", WANTED)
def test_a_training_step_runs(name):
    assert steps.of_training(load(name)) == WANTED[name]


@pytest.mark.parametrize(("name", "step"), [("tiny", "score"), ("dpo_tiny", "decode")])
def test_a_step_that_there_is_not_is_refused(name, step):
    with pytest.raises(ValueError, match=rf"{name} has no step {step}; of a \w+ there are train"):
        steps.build(load(name), step, describe_mesh({"data": 1}), Target("cpu"))

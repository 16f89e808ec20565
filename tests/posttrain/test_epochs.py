import dataclasses

import pytest

from dsjax.config.posttraining import TuningConfig
from dsjax.posttrain.epochs import over_epochs
from dsjax.train.hyperparameters import sequences_before


@pytest.mark.parametrize(
    ("asked", "examples", "steps"), [(TuningConfig.steps, 10, 4), (9, 10, 4), (4, 10, 4), (9, 1, 1)]
)
def test_steps_that_were_asked_for_are_not_replaced_in_silence(asked, examples, steps):
    said = []
    train = TuningConfig(batch_size=4, steps=asked)
    assert over_epochs(train, "sft", 1.5, examples, said.append).steps == steps
    wanted = [
        f"sft.epochs=1.5 makes {steps} steps, and train.steps=9 is not read; sft.epochs=0 leaves "
        "the length to it"
    ]
    assert said == (wanted if asked == 9 else [])


@pytest.mark.parametrize("epochs", [0.5, 1, 3])
def test_a_batch_ramp_takes_the_examples_too(epochs):
    train = TuningConfig(
        batch_size=16, batch_size_start=4, batch_ramp_fraction=0.5, micro_batch_size=2, steps=1
    )
    found = over_epochs(train, "sft", epochs, 200, str)
    shorter = dataclasses.replace(found, steps=found.steps - 1)
    assert (
        sequences_before(shorter, shorter.steps)
        < epochs * 200
        <= sequences_before(found, found.steps)
    )

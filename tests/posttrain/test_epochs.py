import pytest

from dsjax.config.posttraining import TuningConfig
from dsjax.posttrain.epochs import over_epochs


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

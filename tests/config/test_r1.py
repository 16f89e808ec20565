"""The stages of a pipeline: what follows what."""

import dataclasses

import pytest

from dsjax.config import Config
from dsjax.config.finetuning import FineTuning
from dsjax.config.r1 import R1, Samples, Stage
from dsjax.config.shapes import QWEN_1P5B

BASE = Stage(name="base", config=Config(name="base", model=QWEN_1P5B))
TUNED = Stage(name="tuned", init="base", config=FineTuning(name="tuned"))


def pipeline(*stages):
    return R1(name="two", problems="p.jsonl", stages=stages)


def change(stage, **changes):
    return dataclasses.replace(stage, **changes)


def test_stages_may_begin_with_earlier_ones_and_with_checkpoints():
    learned = change(TUNED, name="again", samples=Samples(stage="tuned", problems="p.jsonl"))
    assert len(pipeline(BASE, TUNED, learned).stages) == 3
    assert pipeline(change(TUNED, init="released/v3")).stages[0].init == "released/v3"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "two has no stages"),
        ((BASE, BASE), "stage base is there twice"),
        ((TUNED, BASE), "stage tuned begins with base, which comes later"),
        ((BASE, change(TUNED, init="")), "stage tuned needs init"),
        ((change(BASE, init="elsewhere"),), "pre-trains, so it cannot begin with elsewhere"),
        ((change(BASE, name="a/b"),), "use letters, digits and _"),
        (
            (BASE, change(TUNED, samples=Samples(stage="more", problems="p"))),
            "learns from answers of more, which is no earlier stage; the stages before it: base",
        ),
    ],
)
def test_misfits_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        pipeline(*stages)

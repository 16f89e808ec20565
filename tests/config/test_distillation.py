"""What distillation may not be."""

import pytest

from dsjax.config.distillation import DistillConfig
from dsjax.config.finetuning import FineTuning, SftConfig


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "logits"}, r"distill\.kind=logits needs a teacher.*distill\.teacher"),
        ({"teacher": "t"}, r"distill\.teacher=t is not used.*tools/sample\.py.*kind=logits"),
        ({"top_k": 8}, r"distill\.top_k=8 goes with"),
        ({"kind": "on_policy", "teacher": "t", "top_k": 8}, r"distill\.top_k=8 goes with"),
        ({"kind": "logits", "teacher": "t", "temperature": 0.0}, r"temperature=0\.0 must be"),
        ({"kind": "logits", "teacher": "t", "top_k": -1}, r"top_k=-1 must not be negative"),
    ],
)
def test_bad_values_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        DistillConfig(**values)


def test_a_teacher_says_nothing_to_mtp_modules():
    distill = DistillConfig(kind="logits", teacher="t")
    with pytest.raises(ValueError, match=r"sft\.mtp=on: distill\.kind=logits has no loss"):
        FineTuning(name="f", sft=SftConfig(mtp="on"), distill=distill)


def test_answers_of_the_student_make_no_epochs():
    distill = DistillConfig(kind="on_policy", teacher="t")
    with pytest.raises(ValueError, match=r"sft\.epochs=2\.0 counts passes.*set sft\.epochs=0"):
        FineTuning(name="f", sft=SftConfig(epochs=2.0), distill=distill)

"""Experts divide into the groups of the balance losses, in every kind of experiment that trains."""

import pytest

from dsjax.config import TrainConfig
from dsjax.config.balance import check_balance_devices
from dsjax.config.finetuning import FineTuning
from dsjax.config.posttraining import TuningConfig
from tests.config.test_pretraining import MOE, model

RULE = r"model\.n_routed_experts=8 does not divide over train\.n_balance_devices=3"


def test_groups_divide_the_experts():
    check_balance_devices(TrainConfig(n_balance_devices=4), model(**MOE))
    check_balance_devices(TrainConfig(n_balance_devices=3), model())  # dense
    with pytest.raises(ValueError, match=RULE):
        check_balance_devices(TrainConfig(n_balance_devices=3), model(**MOE))


def test_fine_tuning_keeps_the_rule_once_it_has_its_model():
    train = TuningConfig(n_balance_devices=3)
    assert FineTuning(name="example", train=train).model is None
    with pytest.raises(ValueError, match=RULE):
        FineTuning(name="example", train=train, model=model(**MOE))

"""How experts divide into the groups of the balance losses: a rule across groups of the config."""

from __future__ import annotations

from dsjax.config.model import ModelConfig
from dsjax.config.rules import require
from dsjax.config.train import TrainConfig


def check_balance_devices(train: TrainConfig, model: ModelConfig) -> None:
    """Checks that `train.n_balance_devices` divides the routed experts.

    Raises:
      ValueError: it does not; names both keys.
    """
    groups = train.n_balance_devices or model.n_expert_groups
    require(
        model.n_routed_experts % groups == 0,
        f"model.n_routed_experts={model.n_routed_experts} does not divide over "
        f"train.n_balance_devices={groups}",
    )

"""The rules of a reinforcement-learning experiment."""

import pytest

from dsjax import settings
from dsjax.config import MeshConfig, ModelConfig
from dsjax.config.posttraining import TuningConfig
from dsjax.config.reinforcement import Reinforcement, RewardConfig, RlConfig

MODEL = ModelConfig(
    vocab_size=64, dim=16, n_layers=2, n_dense_layers=1, n_heads=2, inter_dim=32, max_seq_len=64,
    n_routed_experts=8, n_activated_experts=2, moe_inter_dim=8, attention="gqa",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, r"rl\.group_size=1 must be at least 2"),
        ({"prompts": 3, "group_size": 3, "minibatches": 2}, r"the 9 answers of rl\.prompts=3"),
        ({"rewards": ()}, r"rl\.rewards is empty"),
        ({"rewards": ("math", "math")}, r"rl\.rewards=math,math names one twice"),
        ({"template": "Solve it"}, r"rl\.template='Solve it' has no \{prompt\}"),
        ({"keep": (2.0, 0.5)}, r"rl\.keep=\(2\.0, 0\.5\)"),
        ({"keep": (0.5,)}, r"rl\.keep=\(0\.5,\)"),
        ({"keep": (0.5, 2.0), "truncate": 2.0}, r"correct the same thing"),
        ({"beta": 0.0, "reference_every": 4}, r"rl\.beta=0 does not keep"),
        ({"temperature": 0.0}, r"rl\.temperature=0\.0 must be greater than 0"),
        ({"epsilon": -1.0}, r"rl\.epsilon=-1\.0"),
        ({"log_samples": -2}, r"rl\.log_samples=-2"),
        ({"top_p": 0.0}, r"rl\.top_p=0\.0 must lie in"),
        ({"top_k": 1}, r"rl\.top_k=1 must be at least 2"),
    ],
)
def test_group_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        RlConfig(**changes)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"reward": RewardConfig(weights=(1.0,))}, r"reward\.weights=\(1\.0,\) are 1 for the 2"),
        (
            {"train": TuningConfig(batch_size_start=4, micro_batch_size=4)},
            r"train\.batch_size_start=4",
        ),
        ({"rl": RlConfig(max_new_tokens=64)}, r"rl\.max_new_tokens=64 leaves no room"),
        ({"rl": RlConfig(max_new_tokens=8, speculative=True)}, r"the checkpoint has none"),
        (
            {"rl": RlConfig(max_new_tokens=8), "mesh": MeshConfig(pipe=2)},
            r"a pipeline \(mesh\.pipe=2\) cannot replay",
        ),
    ],
)
def test_root_refuses_groups_that_do_not_fit(groups, message):
    with pytest.raises(ValueError, match=message):
        Reinforcement(**({"name": "x", "model": MODEL} | groups))


def test_k1_is_no_choice():
    with pytest.raises(ValueError, match=r"rl\.kl='k1' must be one of k3, rho_k3"):
        settings.override(Reinforcement(name="x"), ["rl.kl=k1"])


def test_values_of_a_command_line_are_read():
    found = settings.override(
        Reinforcement(name="x"),
        ["rl.rewards=countdown,format", "rl.keep=0.5,2", "rl.replay=off", "rl.beta=0"],
    )
    assert found.rl.rewards == ("countdown", "format") and found.rl.keep == (0.5, 2.0)
    assert found.rl.replay is False and found.rl.beta == 0.0
    assert settings.from_dict(settings.to_dict(found), kind=Reinforcement) == found


def test_dense_model_has_nothing_to_replay():
    dense = ModelConfig(
        vocab_size=64, dim=16, n_layers=1, n_dense_layers=1, n_heads=2, inter_dim=32,
        attention="gqa",
    )  # fmt: skip
    assert not Reinforcement(name="x", model=dense, mesh=MeshConfig(pipe=2)).replays
    assert Reinforcement(name="x", model=MODEL, rl=RlConfig(max_new_tokens=8)).replays

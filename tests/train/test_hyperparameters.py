"""The schedule against the numbers of DeepSeek-V3 section 4.2."""

import dataclasses

import pytest

from dsjax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from dsjax.train import hyperparameters

V3_TOKENS = 14.8e12
MODEL = ModelConfig(
    vocab_size=64,
    dim=16,
    n_layers=1,
    n_heads=2,
    n_dense_layers=1,
    inter_dim=32,
    attention="gqa",
    max_seq_len=8,
)


def config(optim: OptimConfig | None = None, **train) -> Config:
    return Config(
        name="schedule",
        model=MODEL,
        data=DataConfig(sequence_length=8),
        train=TrainConfig(**train),
        optim=optim or OptimConfig(warmup_steps=0),
    )


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0.5e12, 2.2e-4),
        (9.99e12, 2.2e-4),
        (12.15e12, 1.21e-4),
        (14.3e12, 2.2e-5),
        (14.6e12, 2.2e-5),
        (14.7e12, 7.3e-6),
    ],
)
def test_learning_rate_v3_published_points(tokens, rate):
    got = hyperparameters.learning_rate(OptimConfig(), step=100_000, share=tokens / V3_TOKENS)
    assert got == pytest.approx(rate, rel=1e-9)


def test_learning_rate_warms_up_linearly_in_steps():
    optim = OptimConfig(learning_rate=1.0, warmup_steps=4)
    rates = [hyperparameters.learning_rate(optim, step, share=0.0) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_learning_rate_multistep_holds_given_ratios():
    optim = OptimConfig(
        learning_rate=4.2e-4,
        schedule="multistep",
        warmup_steps=0,
        decay_points=(0.8, 0.9),
        decay_ratios=(0.316, 0.1),
    )
    rates = [
        hyperparameters.learning_rate(optim, step=9, share=share)
        for share in (0.79, 0.8, 0.89, 0.9, 1.0)
    ]
    assert rates == pytest.approx([4.2e-4, 4.2e-4 * 0.316, 4.2e-4 * 0.316, 4.2e-5, 4.2e-5])


def test_learning_rate_cosine_falls_to_its_ratio_over_the_run():
    """R1's third stage: 5e-5 to 5e-6 (arXiv:2501.12948)."""
    optim = OptimConfig(learning_rate=5e-5, schedule="cosine", warmup_steps=2, final_ratio=0.1)
    rates = [hyperparameters.learning_rate(optim, step, step / 8) for step in (0, 1, 2, 4, 6, 8)]
    # 0.55 + 0.45 cos(pi/4) after a quarter
    assert rates == pytest.approx([2.5e-5, 5e-5, 4.340990e-5, 2.75e-5, 1.159010e-5, 5e-6], rel=1e-6)


def test_learning_rate_constant_ignores_decay_points():
    optim = OptimConfig(learning_rate=3e-4, schedule="constant", warmup_steps=0)
    assert hyperparameters.learning_rate(optim, step=9, share=0.99) == 3e-4


def test_batch_ramp_grows_by_micro_batches_in_equal_stages():
    """V3's ramp, 3072 to 15360 sequences, in micro-batches of 1024 over the first 40 steps."""
    train = TrainConfig(
        steps=100,
        batch_size=15360,
        batch_size_start=3072,
        micro_batch_size=1024,
        batch_ramp_fraction=0.4,
    )
    assert hyperparameters.batch_stages(train) == [
        (0, 3072),
        (10, 6144),
        (20, 9216),
        (30, 12288),
        (40, 15360),
    ]


def test_batch_ramp_without_room_has_one_stage():
    same = TrainConfig(
        steps=100, batch_size=8, batch_size_start=8, micro_batch_size=4, batch_ramp_fraction=0.4
    )
    assert hyperparameters.batch_stages(same) == [(0, 8)]
    assert hyperparameters.batch_stages(TrainConfig(batch_size=8)) == [(0, 8)]


def test_sequences_before_equals_sum_of_batches():
    run = config(
        steps=50, batch_size=28, batch_size_start=4, micro_batch_size=4, batch_ramp_fraction=0.5
    )
    sizes = [hyperparameters.batch_size(run.train, step) for step in range(50)]
    assert sizes[0] == 4 and sizes[-1] == 28 and sorted(sizes) == sizes
    for step in range(51):
        assert hyperparameters.sequences_before(run.train, step) == sum(sizes[:step])
    assert (hyperparameters.progress(run.train, 0), hyperparameters.progress(run.train, 50)) == (
        0.0,
        1.0,
    )


def test_knobs_follow_tokens_and_not_steps():
    """Half the steps of a ramp carry less than half the tokens, so the switches come later than
    half-way.
    """
    run = config(
        OptimConfig(warmup_steps=0),
        steps=100,
        batch_size=8,
        batch_size_start=2,
        micro_batch_size=2,
        batch_ramp_fraction=0.5,
        mtp_switch=0.5,
        bias_update_until=0.5,
    )
    late = [step for step in range(100) if hyperparameters.knobs(run, step)["mtp_weight"] == 0.1]
    before, then, whole = (
        hyperparameters.sequences_before(run.train, step) for step in (late[0] - 1, late[0], 100)
    )
    assert late[0] > 60 and before < whole / 2 <= then
    assert hyperparameters.knobs(run, late[0] - 1) == {
        "learning_rate": 2.2e-4,
        "mtp_weight": 0.3,
        "bias_update_speed": 0.001,
    }
    assert hyperparameters.knobs(run, late[0])["bias_update_speed"] == 0.0


def test_knobs_reach_last_tail():
    run = config(steps=1000)
    assert hyperparameters.knobs(run, 999)["learning_rate"] == pytest.approx(7.3e-6)
    assert hyperparameters.knobs(run, 999)["bias_update_speed"] == 0.0
    assert (
        hyperparameters.knobs(dataclasses.replace(run, optim=OptimConfig()), 999)["learning_rate"]
        == 1.1e-4
    )

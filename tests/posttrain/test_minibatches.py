"""Packing loses nothing, mixes nothing up, and weighs as the whole minibatch says."""

import numpy as np
import pytest

from dsjax.posttrain.minibatches import Layout, Sample, pack, rounded_up, split_samples
from dsjax.posttrain.rollout import Answer

LAYOUT = Layout(length=13, unit=2, micro_batch=1, pad=9, n_experts=8)


def samples(count, *, experts=True, seed=0):
    """Samples whose every number is another one."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        prompt, n = tuple(rng.integers(10, 99, rng.integers(1, 4))), int(rng.integers(1, 9))
        choices = rng.integers(0, 8, (len(prompt) + n - 1, 3, 2), np.int32) if experts else None
        logprobs = rng.normal(size=n).astype(np.float32)
        answer = Answer(tuple(rng.integers(100, 999, n)), logprobs, choices, True)
        found.append(Sample(prompt, answer, number + 1.0))
    return found


def unpacked(batch, minibatch):
    """(tokens, tokens of the answer, samp, advantage, weight, experts) of each sample, sorted."""
    found = []
    flat = {
        name: array[minibatch].reshape(-1, 13) for name, array in batch.items() if name != "experts"
    }
    experts = batch.get("experts")
    if experts is not None:
        experts = experts[minibatch].reshape(-1, 13, 3, 2)
    for row, segments in enumerate(flat["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            own = np.flatnonzero(segments == segment)
            assert (np.diff(own) == 1).all()
            answered = own[flat["weights"][row, own] != 0]
            (advantage,) = set(flat["advantages"][row, answered])
            (weight,) = set(flat["weights"][row, answered])
            assert not flat["advantages"][row, np.setdiff1d(own, answered)].any()
            found.append(
                (
                    float(advantage),
                    flat["tokens"][row, own].tolist(),
                    flat["tokens"][row, answered].tolist(),
                    flat["samp"][row, answered].tolist(),
                    float(weight),
                    None if experts is None else experts[row, own[:-1]].tolist(),
                )
            )
    return sorted(found)


@pytest.mark.parametrize("experts", [True, False])
def test_every_sample_is_there_once_and_whole(experts):
    given = [samples(7, experts=experts), samples(12, experts=experts, seed=1)]
    batch = pack(given, LAYOUT, "sequence", 8)
    assert batch["tokens"].shape[0] == 2 and ("experts" in batch) == experts
    for number, expected in enumerate(given):
        wanted = [
            (
                sample.advantages,
                [*sample.prompt, *sample.answer.tokens],
                list(sample.answer.tokens),
                sample.answer.logprobs.tolist(),
                float(np.float32(1 / (len(expected) * len(sample.answer.tokens)))),
                sample.answer.experts.tolist() if experts else None,
            )
            for sample in expected
        ]
        assert unpacked(batch, number) == sorted(wanted)


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_weights_are_those_of_the_minibatch(average):
    given = [samples(5), samples(9, seed=3)]
    batch = pack(given, LAYOUT, average, 8)
    for weights, own in zip(batch["weights"], given, strict=True):
        tokens = sum(len(sample.answer.tokens) for sample in own)
        wanted = {"sequence": 1.0, "token": 1.0, "constant": tokens / (len(own) * 8)}[average]
        np.testing.assert_allclose(weights.sum(dtype=np.float64), wanted, rtol=1e-6)


def test_rows_fill_up_and_come_in_few_numbers():
    batch = pack([samples(40)], LAYOUT, "sequence", 8)
    needed = sum(sample.length for sample in samples(40))
    rows = np.prod(batch["tokens"].shape[1:3])
    assert needed / 13 <= rows <= 1.4 * needed / 13
    # 1 to 8, then two significant bits more than the power of two.
    assert [rounded_up(n) for n in (1, 7, 8, 9, 11, 13, 16, 17, 33)] == [
        1, 7, 8, 10, 12, 14, 16, 20, 40,
    ]  # fmt: skip
    assert all(n <= rounded_up(n) <= 1.25 * n for n in range(1, 5000))


def test_padding_takes_turns_among_experts():
    batch = pack([samples(1)], LAYOUT, "sequence", 8)
    padding = batch["experts"][0].reshape(-1, 13, 3, 2)[-1]
    assert not batch["segment_ids"][0].reshape(-1, 13)[-1].any()
    assert (padding[..., 0] != padding[..., 1]).all()  # a token's experts differ
    counts = np.bincount(padding.ravel(), minlength=8)
    assert counts.max() - counts.min() <= 3  # one per layer


def test_kept_ids_stand_at_their_tokens_and_elsewhere_all_do():
    given = [
        sample._replace(answer=sample.answer._replace(kept=kept_of(sample)))
        for sample in samples(7, experts=False)
    ]
    batch = pack([given], LAYOUT, "sequence", 8)
    kept, answered = batch["kept"].reshape(-1, 13, 2), batch["weights"].reshape(-1, 13) != 0
    assert batch["kept"].dtype == np.uint32 and (kept[~answered] == 0xFFFFFFFF).all()
    tokens = batch["tokens"].reshape(-1, 13)[answered]
    np.testing.assert_array_equal(kept[answered], np.stack([tokens, tokens + 1], axis=1))
    assert "kept" not in pack([samples(2)], LAYOUT, "sequence", 8)


def kept_of(sample):
    tokens = np.array(sample.answer.tokens, np.uint32)
    return np.stack([tokens, tokens + 1], axis=1)


def test_minibatch_without_samples_weighs_nothing():
    batch = pack([[], samples(2)], LAYOUT, "token", 8)
    assert not batch["weights"][0].any() and batch["weights"][1].any()


def test_deal_is_random_by_seed_and_step_and_even():
    given = samples(10)
    dealt = split_samples(given, 3, seed=0, step=0)
    numbers = [[sample.advantages for sample in part] for part in dealt]
    assert sorted(map(len, numbers)) == [3, 3, 4]
    assert {n for part in numbers for n in part} == {sample.advantages for sample in given}
    again = split_samples(given, 3, seed=0, step=0)
    assert [[sample.advantages for sample in part] for part in again] == numbers
    for other in ({"seed": 1, "step": 0}, {"seed": 0, "step": 1}):
        parts = split_samples(given, 3, **other)
        assert [[sample.advantages for sample in part] for part in parts] != numbers

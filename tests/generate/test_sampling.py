"""The choice of a token: filters against a slow NumPy twin, draws against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.generate import sampling
from dsjax.generate.sampling import Sampling

SHARES = [0.5, 0.3, 0.15, 0.05]
LOGITS = jnp.log(jnp.asarray([SHARES], jnp.float32))
probabilities = jax.jit(sampling.probabilities)
sample = jax.jit(sampling.sample)


def expected(logits, options):
    """The distribution of one row in float64, filter after filter on a sorted list."""
    if options.temperature == 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    weights = np.exp((np.float64(logits) - np.max(logits)) / options.temperature)
    order = np.lexsort((np.arange(len(logits)), -weights))
    order = order[: options.top_k or None]
    total = np.cumsum(weights[order])
    if options.top_p < 1:
        order = order[: 1 + int(np.sum(total < options.top_p * total[-1]))]
    kept = [i for i in order if weights[i] >= options.min_p]
    result = np.zeros(len(logits))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


def kept(options, logits=LOGITS):
    found = np.asarray(probabilities(logits, sampling.knobs([options])))[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-5)
    return np.flatnonzero(found).tolist()


def chi_square(tokens, distribution):
    """Pearson's statistic over the tokens that can come; others must not."""
    counts = np.bincount(tokens, minlength=len(distribution))
    possible = distribution > 0
    assert not counts[~possible].any()
    wanted = distribution[possible] * len(tokens)
    return float(np.sum((counts[possible] - wanted) ** 2 / wanted))


def test_greedy_takes_the_likeliest_and_the_first_of_several():
    logits = jnp.asarray([[0.0, 2.0, 1.0], [3.0, 1.0, 3.0]], jnp.float32)
    assert sampling.greedy(logits).tolist() == [1, 0]
    knobs = sampling.knobs([Sampling(temperature=0)] * 2)
    assert sample(logits, knobs, jnp.zeros(2, jnp.int32)).tolist() == [1, 0]
    assert probabilities(logits, knobs).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(("platform", "reductions"), [("cpu", 2), ("cuda", 1), ("tpu", 1)])
def test_a_cpu_finds_the_likeliest_in_two_reductions(platform, reductions):
    traced = jax.jit(sampling.greedy).trace(LOGITS)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.reduce(") == reductions


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 10**12}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [0]),
        ({"top_p": 0.49}, [0]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.9}, [0, 1, 2]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 0.29}, [0, 1, 2]),
        ({"min_p": 0.31}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        # 0.5 and 0.3 are 0.625 and 0.375 of what top-k leaves: the first alone reaches 0.6
        ({"top_k": 2, "top_p": 0.6}, [0]),
        # squared and renormalised: 0.68, 0.25, 0.06, 0.01
        ({"temperature": 0.5, "top_p": 0.9}, [0, 1]),
        ({"temperature": 1e-30}, [0]),
        ({"temperature": 1e30, "top_p": 0.9}, [0, 1, 2, 3]),
    ],
)
def test_filters_keep(options, ids):
    assert kept(Sampling(**options)) == ids


def test_top_p_of_one_keeps_tokens_too_unlikely_to_count():
    """Beside a row that drops some: a sum in float32 is complete without them."""
    logits = jnp.asarray([[0.0, -30.0], [0.0, -30.0]], jnp.float32)
    found = probabilities(logits, sampling.knobs([Sampling(), Sampling(top_p=0.9)]))
    assert (np.asarray(found) > 0).tolist() == [[True, True], [True, False]]


def test_temperatures_that_vanish_in_float32_are_zero():
    knobs = sampling.knobs([Sampling(1e-40), Sampling(1e-300), Sampling(1e-37)])
    assert (np.asarray(knobs.temperature_B) == 0).tolist() == [True, True, False]


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}])
def test_equal_logits_stay_by_id(options):
    assert kept(Sampling(**options), jnp.zeros((1, 6), jnp.float32)) == [0, 1, 2]


def test_impossible_tokens_stay_out():
    logits = jnp.asarray([[-jnp.inf, 1.0, -jnp.inf, 1.0]], jnp.float32)
    for options in (Sampling(), Sampling(top_k=4), Sampling(top_p=0.99)):
        assert kept(options, logits) == [1, 3]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-40, 40), min_size=7, max_size=7),
    st.lists(
        st.builds(
            Sampling,
            temperature=st.sampled_from([0, 0.3, 1.0, 2.0]),
            top_k=st.integers(0, 8),
            top_p=st.sampled_from([0.11, 0.52, 0.93, 1.0]),
            min_p=st.sampled_from([0.0, 0.043, 0.31]),
        ),
        min_size=4,
        max_size=4,
    ),
)
def test_rows_follow_their_own_settings(eighths, rows):
    """One program serves a batch of any settings, ties included."""
    logits = np.tile(np.asarray(eighths, np.float32) / 8, (4, 1))
    found = probabilities(logits, sampling.knobs(rows))
    want = [expected(row, options) for row, options in zip(logits, rows, strict=True)]
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.85, min_p=0.2)],
    ids=["plain", "cold", "top_k", "top_p min_p"],
)
def test_draws_follow_the_distribution(options):
    """Positions of one request, and requests that differ in their seed, are independent draws."""
    n = 20_000
    logits = jnp.tile(LOGITS, (n, 1))
    distribution = expected(np.asarray(LOGITS)[0], options)
    one = sampling.knobs([options])
    positions = sampling.repeated(one, n)
    along = np.asarray(sample(logits, positions, jnp.arange(n, dtype=jnp.int32)))
    settings_ = [
        Sampling(options.temperature, options.top_k, options.top_p, options.min_p, seed)
        for seed in range(n)
    ]
    across = np.asarray(sample(logits, sampling.knobs(settings_), jnp.full(n, 7, jnp.int32)))
    # Three degrees of freedom exceed 30.7 once in a million times.
    assert chi_square(along, distribution) < 30.7
    assert chi_square(across, distribution) < 30.7


def test_sharper_temperature_shows_in_the_statistic():
    """Negative control: the statistic tells temperature 1 from 1.1."""
    n = 20_000
    knobs = sampling.repeated(sampling.knobs([Sampling(1.1)]), n)
    tokens = sample(jnp.tile(LOGITS, (n, 1)), knobs, jnp.arange(n, dtype=jnp.int32))
    assert chi_square(np.asarray(tokens), np.asarray(SHARES)) > 30.7


def test_draw_depends_on_seed_and_position_only():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 50)), jnp.float32)
    rows = [Sampling(seed=seed, top_p=0.9 if seed % 2 else 1.0) for seed in range(6)]
    positions = jnp.asarray([3, 1, 4, 1, 5, 9], jnp.int32)
    together = np.asarray(sample(logits, sampling.knobs(rows), positions))
    order = np.asarray([4, 2, 0, 5, 1, 3])
    shuffled = sample(logits[order], sampling.knobs([rows[i] for i in order]), positions[order])
    np.testing.assert_array_equal(together[order], shuffled)
    alone = [
        int(sample(logits[i : i + 1], sampling.knobs([rows[i]]), positions[i : i + 1])[0])
        for i in range(6)
    ]
    assert together.tolist() == alone


def test_one_program_serves_every_setting():
    traced = []

    @jax.jit
    def counted(logits, knobs, positions):
        traced.append(logits.shape)
        return sampling.sample(logits, knobs, positions)

    for options in (Sampling(0), Sampling(), Sampling(top_k=2), Sampling(top_p=0.5, min_p=0.1)):
        counted(LOGITS, sampling.knobs([options]), jnp.zeros(1, jnp.int32))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("rows", "ran"),
    [
        ([Sampling(0), Sampling(0, top_p=0.5)], []),
        ([Sampling(0, top_k=2), Sampling()], ["noise"]),
        ([Sampling(0), Sampling(min_p=0.1)], ["filters", "noise"]),
    ],
    ids=["greedy", "plain", "filtered"],
)
def test_batches_skip_the_work_that_no_row_needs(monkeypatch, rows, ran):
    seen = []

    def watched(name, function):
        def run(*arguments):
            jax.debug.callback(lambda: seen.append(name))
            return function(*arguments)

        return run

    monkeypatch.setattr(sampling, "_kept", watched("filters", sampling._kept))
    monkeypatch.setattr(sampling, "_filtered", watched("noise", sampling._filtered))
    # A function of its own, since jax would take the trace of the case before.
    fresh = jax.jit(lambda *arguments: sampling.sample(*arguments))
    fresh(jnp.tile(LOGITS, (2, 1)), sampling.knobs(rows), jnp.zeros(2, jnp.int32))
    jax.effects_barrier()
    assert sorted(seen) == ran


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be finite and not negative; 0 takes"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"temperature": float("inf")}, "temperature=inf must be finite"),
        ({"top_k": -1}, "top_k=-1 must not be negative; 0 keeps"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]; 1 keeps"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"min_p": 1.01}, r"min_p=1.01 must lie in \[0, 1\]; 0 keeps"),
        ({"min_p": -0.1}, r"min_p=-0.1 must lie in \[0, 1\]"),
        ({"seed": -1}, r"seed=-1 must lie in \[0, 2\*\*32\)"),
        ({"seed": 1 << 32}, r"seed=4294967296 must lie in \[0, 2\*\*32\)"),
    ],
)
def test_sampling_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)

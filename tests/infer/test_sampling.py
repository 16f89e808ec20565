"""The choice of a token, and the window that complete() moves over a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.infer import sampling

LOGITS = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]], jnp.float32))


def draw(n, **options):
    keys = jax.random.split(jax.random.key(0), n)
    return np.asarray(jax.vmap(lambda key: sampling.sample(key, LOGITS, **options))(keys))


def test_greedy_and_zero_temperature_take_the_likeliest():
    assert sampling.greedy(LOGITS).tolist() == [0, 3]
    assert sampling.sample(jax.random.key(0), LOGITS, temperature=0).tolist() == [0, 3]


def test_sample_draws_in_proportion():
    share = np.bincount(draw(20_000)[:, 0], minlength=4) / 20_000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_sample_temperature_sharpens():
    share = np.bincount(draw(20_000, temperature=0.5)[:, 0], minlength=4) / 20_000
    np.testing.assert_allclose(share, np.square([0.5, 0.3, 0.15, 0.05]) / 0.365, atol=0.015)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [0]), (0.49, [0]), (0.6, [0, 1]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    masked = np.asarray(sampling.keep_top_p(LOGITS, top_p))
    assert np.flatnonzero(np.isfinite(masked[0])).tolist() == kept
    np.testing.assert_array_equal(masked[0], masked[1, ::-1])
    assert set(draw(500, top_p=top_p)[:, 0]) <= set(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
    ],
)
def test_sample_rejects_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        sampling.sample(jax.random.key(0), LOGITS, **options)


def test_complete_sees_the_last_window_and_compiles_once():
    """The toy model wants the sum of all tokens up to a position, modulo 11, so any lost or leaked
    token shows.
    """
    traces = []

    def model(tokens_BT):
        traces.append(tokens_BT.shape)
        return 50 * jax.nn.one_hot(jnp.cumsum(tokens_BT, axis=1) % 11, 11)

    want = [1, 2]
    for _ in range(6):
        want.append(sum(want[-4:]) % 11)
    model = jax.tree_util.Partial(model)
    assert sampling.complete(model, [1, 2], n_tokens=6, window=4, top_p=0.9) == want[2:]
    assert traces == [(1, 4)]


def test_complete_rejects_empty_prompt():
    with pytest.raises(ValueError, match="an empty prompt has no next token"):
        sampling.complete(lambda tokens: tokens, [], n_tokens=1, window=4)

"""Steps that ask nothing of the host, against those of the program that does."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.generate import unattended
from dsjax.generate.decoding import MAX_STEPS
from dsjax.generate.record import NOTHING, Wanted
from dsjax.generate.sampling import Sampling, knobs
from tests.generate.test_decoding import decoded, tokens


def test_all_that_is_reported_and_kept_is_as_elsewhere():
    """One row ends by a stop id, and the other by its number of tokens."""
    stop = tokens(decoded([6, 6], steps=6)[2])[0][2]
    (kept, _, got), (wanted_kept, _, wanted) = (
        decoded([9, MAX_STEPS], steps, stop_ids=(stop, -1)) for steps in (None, MAX_STEPS)
    )
    assert got.ran_NB.sum(axis=0)[0] < 9 and got.ran_NB.sum(axis=0)[1] == MAX_STEPS
    for name, ours, theirs in zip(got._fields, got, wanted, strict=True):
        if ours is not None and name != "record_N":
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            assert np.asarray(ours).dtype == np.asarray(theirs).dtype, name
    for name, entries in kept.cache.moe.items():
        np.testing.assert_array_equal(entries, wanted_kept.cache.moe[name])


@pytest.mark.parametrize(
    ("enough", "wanted", "redundant", "bias"),
    [
        (True, NOTHING, False, None),
        (False, Wanted(logprobs=True), False, None),
        (False, NOTHING, True, None),
        (False, NOTHING, False, jnp.zeros((1, 8))),
    ],
)
def test_reports_and_biases_need_the_logits_of_each_step(enough, wanted, redundant, bias):
    settings = knobs([Sampling(0.0)])._replace(bias_BV=bias)
    model = SimpleNamespace(redundant=redundant)
    assert unattended.reports_enough(model, settings, wanted) == enough  # type: ignore

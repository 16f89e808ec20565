"""The filters in the order and to the tokens of transformers' generate()."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.generate import sampling
from dsjax.generate.sampling import Sampling
from tests.closeness import F32, assert_close

pytestmark = pytest.mark.torch

SETTINGS = [
    {},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_k": 7},
    {"top_k": 50, "top_p": 0.8},
    {"temperature": 1.7, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.2},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_distribution_equals_transformers(options):
    import torch
    from transformers.generation import logits_process as hf

    logits = np.random.default_rng(0).normal(0, 2, (5, 200)).astype(np.float32)
    # In generate()'s order, which a comment in its source fixes.
    warpers = {
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    scores = torch.tensor(logits)
    for key, warper in warpers.items():
        if key in options:
            scores = warper(options[key])(None, scores)
    want = torch.softmax(scores, dim=-1).numpy()
    knobs = sampling.knobs([Sampling(**options)] * 5)
    found = np.asarray(sampling.probabilities(jnp.asarray(logits), knobs))
    np.testing.assert_array_equal(found > 0, want > 0)
    assert_close(found, want, F32, "distribution")

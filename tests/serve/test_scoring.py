"""Log-probabilities of given tokens, against the whole forward pass."""

import numpy as np

from dsjax.infer.score import Scorer
from dsjax.serve.scoring import PromptScorer
from tests.model.tiny import tiny_model


def test_scores_are_the_forward_passes():
    model = tiny_model()
    scorer = PromptScorer(Scorer(model), 32)
    assert len(list(scorer.warm())) == 1
    rng = np.random.default_rng(0)
    for length in (1, 2, 16, 21):
        ids = rng.integers(0, model.config.vocab_size, length).tolist()
        scored = scorer.score(ids)
        logits = np.asarray(model(np.asarray([ids], np.int32))[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        order = np.argsort(-logprobs[:-1], axis=-1)[:, :20]
        np.testing.assert_array_equal(scored.top_ids, order)
        wanted = logprobs[np.arange(length - 1), ids[1:]]
        np.testing.assert_allclose(scored.logprobs, wanted, atol=1e-4)
        greedy = np.asarray(ids[1:]) == scored.top_ids[:, 0]
        assert (scored.logprobs[greedy] == scored.top_logprobs[greedy, 0]).all()
        tops = np.take_along_axis(logprobs[:-1], order, axis=-1)
        np.testing.assert_allclose(scored.top_logprobs, tops, atol=1e-4)

"""What is reported of drawn tokens is what the whole forward pass says of them."""

import dataclasses

import jax
import numpy as np
import pytest

from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.model import token_sets
from dsjax.model.cache import empty_cache
from dsjax.model.head import token_nll
from tests.model.tiny import TINY, tiny_model

V3 = dataclasses.replace(TINY, n_layers=2, n_mtp=1)
V2_LITE = dataclasses.replace(
    V3, q_lora_rank=0, n_expert_groups=1, n_limited_groups=1, router_bias=False, norm_topk=False,
    score_func="softmax", route_scale=1.0, n_mtp=0,
)  # fmt: skip
GQA = dataclasses.replace(
    TINY, n_layers=1, n_dense_layers=1, attention="gqa", n_kv_heads=2, head_dim=8, n_mtp=1
)
HOT = Sampling(0.7, top_k=8, top_p=0.9, seed=3)
# Prompts that end in different chunks, so that not all tokens run beside the same others.
REQUESTS = [
    Request(tuple(range(3, 43)), 12, Sampling(0.0), logprobs=True),
    Request((50, 20, 80), 20, HOT, logprobs=True),
    Request((7,), 9, Sampling(1.5, seed=4), logprobs=True),
    Request((9, 8), 4, Sampling(0.0)),
]


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def sampled(logits, sampling):
    """Log-probabilities that the row draws by, float64 [V]: written from the definition."""
    order = np.argsort(-logits, kind="stable")
    if not sampling.temperature:
        kept = order[:1]
    else:
        logits = logits / sampling.temperature
        kept = order[: sampling.top_k or None]
        mass = np.cumsum(np.exp(log_softmax(logits[kept])))
        kept = kept[: np.searchsorted(mass, sampling.top_p) + 1]
    found = np.full(logits.shape, -np.inf)
    found[kept] = log_softmax(logits[kept])
    return found


def trainers_logprobs(model, tokens):
    """What training computes of each next token, [B, T - 1]."""
    hidden = model.hidden(tokens[:, :-1], mtp=False).main_BTD
    return -token_nll(hidden, model.head_weight(), tokens[:, 1:], model.policy, 16)


@pytest.mark.parametrize(
    ("config", "speculative"),
    [(V3, False), (V3, True), (V2_LITE, False), (GQA, False), (GQA, True)],
    ids=["v3", "v3 drafted", "v2-lite", "gqa", "gqa drafted"],
)
def test_logprobs_are_the_trainers_and_those_of_the_whole_forward_pass(config, speculative):
    model = tiny_model(config)
    engine = Engine(model, speculative=speculative, prefill_chunk=16, max_batch=3)
    outputs = engine.complete(REQUESTS)
    forward = jax.jit(lambda rows: model(rows))
    trained = jax.jit(trainers_logprobs)
    for request, output in zip(REQUESTS[:3], outputs[:3], strict=True):
        text = [*request.prompt, *output.tokens]
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(text)] = text
        logits = np.asarray(forward(padded), np.float64)[0, len(request.prompt) - 1 : len(text) - 1]
        chosen = np.arange(len(output.tokens)), output.tokens
        assert output.report.logprobs.dtype == output.report.sampled_logprobs.dtype == np.float32
        np.testing.assert_allclose(output.report.logprobs, log_softmax(logits)[chosen], atol=1e-5)
        want = np.asarray(trained(model, padded))[0, len(request.prompt) - 1 : len(text) - 1]
        np.testing.assert_allclose(output.report.logprobs, want, atol=1e-5)
        drawn = np.stack([sampled(row, request.sampling) for row in logits])[chosen]
        np.testing.assert_allclose(output.report.sampled_logprobs, drawn, atol=1e-5)
    assert outputs[3].report.logprobs is outputs[3].report.sampled_logprobs is None


def test_reports_do_not_change_the_tokens():
    engine = Engine(tiny_model(GQA), prefill_chunk=16)
    silent = [dataclasses.replace(request, logprobs=False) for request in REQUESTS]
    assert [output.tokens for output in engine.complete(silent)] == [
        output.tokens for output in engine.complete(REQUESTS)
    ]


@pytest.mark.parametrize("speculative", [False, True])
def test_kept_ids_are_those_that_could_be_drawn(speculative):
    """Rows that filter beside rows that do not, one that is greedy, and one that does not ask."""
    model = tiny_model(GQA)
    engine = Engine(model, speculative=speculative, prefill_chunk=16, max_batch=3)
    asked = [dataclasses.replace(request, kept=True) for request in REQUESTS[:3]]
    outputs = engine.complete([*asked, REQUESTS[3]])
    assert outputs[3].report.kept is None
    forward = jax.jit(lambda rows: model(rows))
    for request, output in zip(asked, outputs[:3], strict=True):
        text = [*request.prompt, *output.tokens]
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(text)] = text
        logits = np.asarray(forward(padded), np.float64)[0, len(request.prompt) - 1 : len(text) - 1]
        want = np.stack([np.isfinite(sampled(row, request.sampling)) for row in logits])
        got = token_sets.unpack(output.report.kept, GQA.vocab_size)
        np.testing.assert_array_equal(got, want)
        assert want[np.arange(len(output.tokens)), output.tokens].all()


@pytest.mark.parametrize("speculative", [False, True])
def test_experts_are_those_of_every_token_that_ran(speculative):
    """The prompt's and all new tokens' but the last; rows that ask beside rows that do not."""
    model = tiny_model(V3)
    engine = Engine(model, speculative=speculative, prefill_chunk=16, max_batch=2)
    asked = [dataclasses.replace(request, logprobs=False, experts=True) for request in REQUESTS[:3]]
    outputs = engine.complete([*asked, REQUESTS[3]])
    assert outputs[3].report.experts is None
    run = jax.jit(
        lambda rows, cache: model.extend(rows, np.zeros(1, np.int32), cache, routing=True)
    )
    for request, output in zip(asked, outputs[:3], strict=True):
        text = [*request.prompt, *output.tokens][:-1]
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(text)] = text
        whole = run(padded, empty_cache(V3, 1, 64, np.float32)).experts_LBTK[:, 0, : len(text)]
        assert output.report.experts.shape == (len(text), V3.n_moe_layers, V3.n_activated_experts)
        np.testing.assert_array_equal(
            np.sort(np.moveaxis(output.report.experts, 0, 1)), np.sort(np.asarray(whole))
        )

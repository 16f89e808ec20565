"""DeepSeek-V3.2 against transformers' deepseek_v32, on random checkpoints longer than the number of
keys: the keys that every query chooses, logits, and greedy tokens decoded across that number.

Two scores that differ in the last digits of float32 may change places, and the logits with them. So
logits are compared up to the first query of which any layer chose other keys than transformers, and
the scores there must be that close. Set DSJAX_REFERENCE_SEED to try other checkpoints.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.generate.engine import Engine
from dsjax.generate.request import Request
from dsjax.generate.sampling import Sampling
from dsjax.kernels import sparse_attention
from dsjax.model.sparse_mla import SparseMLA
from tests.closeness import LOGITS, assert_close
from tests.golden import checkpoint, ours
from tests.golden.cases import LENGTH, V32, Case

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
SEED = int(os.environ.get("DSJAX_REFERENCE_SEED", "100"))
CLOSE = 4e-6  # of two scores, in standard deviations of their query's
FEWEST = 300  # positions that must be comparable


def drawn(seed: int) -> Case:
    rng = np.random.default_rng([seed, 32])

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    return Case(
        V32
        | {
            "index_n_heads": pick(16, 24, 32),
            "index_head_dim": pick(32, 40, 64),
            "index_topk": int(rng.integers(40, 200)),
            "qk_rope_head_dim": pick(8, 16, 32),
            "qk_nope_head_dim": pick(16, 24),
            "q_lora_rank": pick(20, 48),
            "first_k_dense_replace": pick(1, 2),
            "rope_theta": pick(1000.0, 10000.0),
        },
        seed,
    )


def chosen_by_transformers(model, tokens_T) -> list[np.ndarray]:
    """Each layer's choice as a mask, [T, T], future keys left out."""
    import torch

    found: list[np.ndarray] = []

    def keep(module, inputs, output):
        mask = np.zeros((len(tokens_T), len(tokens_T)), bool)
        np.put_along_axis(mask, output[0].numpy().astype(np.int64), True, axis=1)
        found.append(np.tril(mask))

    handles = [layer.self_attn.indexer.register_forward_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens_T).long()[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return [*found, logits.numpy()]


def chosen_by_us(model, tokens_T, monkeypatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each layer's scores and choice, [T, T] each, of the form that masks: the one that gathers
    chooses by the same scores. Chunks that choose all are masked causally.
    """
    T, count, right = len(tokens_T), model.config.index_topk, sparse_attention.chosen
    chunks: list[tuple[np.ndarray, np.ndarray]] = []

    def keep(scores_BTS, visible_BTS, count):
        mask_BTS = right(scores_BTS, visible_BTS, count)
        chunks.append((np.asarray(scores_BTS[0]), np.asarray(mask_BTS[0])))
        return mask_BTS

    monkeypatch.setattr(SparseMLA, "gathers", lambda *_: False)
    monkeypatch.setattr(sparse_attention, "chosen", keep)
    monkeypatch.setattr(jax, "checkpoint", lambda function: function)  # it would trace
    with jax.disable_jit():
        model(jnp.asarray(tokens_T)[None])
    monkeypatch.undo()
    found = []
    for _ in range(model.config.n_layers):
        scores, mask = np.zeros((T, T), np.float32), np.tril(np.ones((T, T), bool))
        start = count // 128 * 128
        while start < T:
            part_scores, part_mask = chunks.pop(0)
            rows = slice(start, start + len(part_mask))
            scores[rows, : part_scores.shape[1]] = part_scores
            mask[rows] = False
            mask[rows, : part_mask.shape[1]] = part_mask
            start = rows.stop
        found.append((scores, mask))
    assert not chunks
    return found


def first_difference(theirs, own) -> int:
    """The first query of which a layer chose other keys; their scores must be close."""
    first = LENGTH
    for their_mask, (scores, mask) in zip(theirs, own, strict=True):
        differs = np.flatnonzero((their_mask != mask).any(axis=1))
        if len(differs) and differs[0] < first:
            first = int(differs[0])
            others = scores[first][their_mask[first] != mask[first]]
            spread = scores[first, : first + 1].std()
            assert np.ptp(others) < CLOSE * spread, f"position {first}: {np.ptp(others) / spread}"
    return first


@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
def test_random_checkpoint_equals_transformers(seed, monkeypatch):
    from tests.golden import transformers_reference

    case = drawn(seed)
    reference, tokens_T = transformers_reference.load(case), checkpoint.tokens(case, LENGTH)
    *theirs, want = chosen_by_transformers(reference, tokens_T)
    model = ours.place(*checkpoint.parameters(case))
    end = first_difference(theirs, chosen_by_us(model, tokens_T, monkeypatch))
    assert end >= FEWEST > case.config["index_topk"], end
    for gathers in (False, True):
        monkeypatch.setattr(SparseMLA, "gathers", lambda *_, gathers=gathers: gathers)
        got = np.asarray(jax.jit(lambda model: model(tokens_T[None])[0])(model))
        assert_close(got[:end], want[:end], LOGITS, f"logits, gathered: {gathers}")


def test_greedy_tokens_equal_transformers_across_the_number_of_keys():
    import torch

    from tests.golden import transformers_reference

    case, new = drawn(SEED), 40
    count = case.config["index_topk"]
    prompt = checkpoint.tokens(case, count - 20)
    reference = transformers_reference.load(case)
    with torch.no_grad():
        whole = reference.generate(
            torch.from_numpy(prompt).long()[None],
            max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True,
        )[0]  # fmt: skip
    model = ours.place(*checkpoint.parameters(case))
    asked = Request(tuple(prompt.tolist()), new, sampling=Sampling(temperature=0.0))
    (output,) = Engine(model).complete([asked])
    assert output.tokens == whole[len(prompt) :].tolist()

"""Losses and balancing: next-token and multi-token cross-entropy, V3's and V2's balance losses, the
bias update.

V3 equations 17-20 and 24-25; V2 equations 23-31; auxiliary-loss-free balancing (arXiv:2408.15664)
algorithm 1. A "sequence" below is what the papers sum over: scores_TE and the chosen experts of its
tokens.
"""

from __future__ import annotations

import numpy as np

from tests.oracles.experts import best


def token_losses(logits_TV: np.ndarray, targets_T: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] of each position."""
    losses = []
    for logits, target in zip(logits_TV, targets_T, strict=True):
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])
    return np.array(losses)


def cross_entropy(
    logits_TV: np.ndarray, targets_T: np.ndarray, counted_T: np.ndarray | None = None
) -> float:
    """Mean over the positions that count; 0 if none does."""
    losses = token_losses(logits_TV, targets_T)
    counted = np.ones(len(losses), dtype=bool) if counted_T is None else counted_T
    return float(losses[counted].sum() / max(counted.sum(), 1))


def mtp_loss(mtp_logits: list[np.ndarray], tokens: np.ndarray, length: int) -> float:
    """V3 equations 24-25 without lambda: mean over depths of -1/T sum log P_k[t_i], T - k terms but
    divided by T.

    `tokens` are t_1 .. t_{T+1}; `mtp_logits[k - 1]` has T - k rows, row i (from 1) predicting
    t_{i+k+1}.
    """
    depths = []
    for depth, logits in enumerate(mtp_logits, start=1):
        total = 0.0
        for i in range(2 + depth, length + 2):  # the paper's index of the target, counted from 1
            total += token_losses(logits[i - depth - 2 : i - depth - 1], tokens[i - 1 : i])[0]
        depths.append(total / length)
    return float(np.mean(depths))


def sequence_balance(scores_TE: np.ndarray, top_k: int) -> float:
    """V3 equations 17-20 for one sequence without alpha: sum f_i P_i, f counted on the unbiased
    scores."""
    length, experts = scores_TE.shape
    chosen = np.zeros(experts)
    share = np.zeros(experts)
    for scores in scores_TE:
        for expert in best(scores, top_k):
            chosen[expert] += experts / (top_k * length)
        share += scores / scores.sum() / length
    return float((chosen * share).sum())


def load_and_share(
    scores_TE: np.ndarray, chosen_TK: list[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """V2 equations 24-25: f_i from the experts really chosen, P_i the mean score."""
    length, experts = scores_TE.shape
    load = np.zeros(experts)
    for chosen in chosen_TK:
        for expert in chosen:
            load[expert] += experts / (len(chosen) * length)
    return load, scores_TE.mean(axis=0)


def expert_balance(scores_TE: np.ndarray, chosen_TK: list[list[int]]) -> float:
    """V2 equation 23 without alpha 1."""
    load, share = load_and_share(scores_TE, chosen_TK)
    return float((load * share).sum())


def device_balance(scores_TE: np.ndarray, chosen_TK: list[list[int]], devices: int) -> float:
    """V2 equations 26-28 without alpha 2: a device's load is the mean of its experts', its share
    their sum."""
    load, share = load_and_share(scores_TE, chosen_TK)
    return float(
        (load.reshape(devices, -1).mean(axis=1) * share.reshape(devices, -1).sum(axis=1)).sum()
    )


def communication_balance(
    scores_TE: np.ndarray, chosen_TK: list[list[int]], devices: int, limit: int
) -> float:
    """V2 equations 29-31 without alpha 3: f counts the tokens sent to a device, times D / (M T)."""
    length, experts = scores_TE.shape
    sent = np.zeros(devices)
    for chosen in chosen_TK:
        for device in {expert // (experts // devices) for expert in chosen}:
            sent[device] += devices / (limit * length)
    _, share = load_and_share(scores_TE, chosen_TK)
    return float((sent * share.reshape(devices, -1).sum(axis=1)).sum())


def over_documents(loss, segments_T: np.ndarray, *per_token) -> float:
    """Applies a sequence loss to each document of a packed row; the mean is weighted by tokens,
    padding (0) left out."""
    total, tokens = 0.0, 0
    for segment in sorted(set(segments_T.tolist()) - {0}):
        inside = np.flatnonzero(segments_T == segment)
        total += len(inside) * loss(*([values[t] for t in inside] for values in per_token))
        tokens += len(inside)
    return total / max(tokens, 1)


def bias_update(bias_E: np.ndarray, counts_E: np.ndarray, speed: float) -> np.ndarray:
    """Overloaded experts lose `speed`, underloaded ones gain it; counts are those of the whole
    global batch."""
    return bias_E + speed * np.sign(counts_E.mean() - counts_E)


def max_violation(counts_E: np.ndarray) -> float:
    return float((counts_E.max() - counts_E.mean()) / counts_E.mean())

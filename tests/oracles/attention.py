"""One sequence through an attention block, head by head: MLA (V2 section 2.1, equations 9-19),
grouped queries, and the indexer that chooses MLA's keys (V3.2 section 2)."""

from __future__ import annotations

import numpy as np

from dsjax.config import ModelConfig
from tests.oracles import rope


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def attend(q_TH, k_TH, v_TW, visible_TT, scale: float) -> np.ndarray:
    """Softmax attention of one head."""
    scores = np.where(visible_TT, q_TH @ k_TH.T * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v_TW


def visible(segments_T: np.ndarray) -> np.ndarray:
    """Causal, and only inside a document [T, T]."""
    order = np.arange(len(segments_T))
    return (order[:, None] >= order[None, :]) & (segments_T[:, None] == segments_T[None, :])


def positions(segments_T: np.ndarray) -> np.ndarray:
    """Place of each token in its document."""
    places = np.zeros(len(segments_T), dtype=np.int64)
    for t in range(1, len(segments_T)):
        places[t] = places[t - 1] + 1 if segments_T[t] == segments_T[t - 1] else 0
    return places


def attention(
    x_TD: np.ndarray, params: dict, config: ModelConfig, segments_T: np.ndarray
) -> np.ndarray:
    block = mla if config.attention == "mla" else gqa
    return block(x_TD, params, config, segments_T)


def mla(x_TD: np.ndarray, params: dict, config: ModelConfig, segments_T: np.ndarray) -> np.ndarray:
    """The latents' norms have an epsilon of their own, as in DeepSeek's code."""
    places, mask = positions(segments_T), visible(segments_T)
    if config.index_topk:
        mask = chosen(index_scores(x_TD, params, config, places), mask, config.index_topk)
    nope, latent = config.qk_nope_head_dim, config.kv_lora_rank
    if config.q_lora_rank:
        query = (
            rms_norm(x_TD @ params["wq_a"], params["q_norm"]["weight"], config.norm_eps)
            @ params["wq_b"]
        )
    else:
        query = x_TD @ params["wq"]
    compressed = x_TD @ params["wkv_a"]
    c_TC = rms_norm(compressed[:, :latent], params["kv_norm"]["weight"], 1e-6)
    k_rope_TR = rope.rotate_pairs(compressed[:, latent:], places, config)  # one key for all heads
    outputs = []
    for head in range(config.n_heads):
        q = query[:, head * config.qk_head_dim : (head + 1) * config.qk_head_dim]
        width = nope + config.v_head_dim
        kv = c_TC @ params["wkv_b"][:, head * width : (head + 1) * width]
        q = np.concatenate([q[:, :nope], rope.rotate_pairs(q[:, nope:], places, config)], axis=1)
        k = np.concatenate([kv[:, :nope], k_rope_TR], axis=1)
        outputs.append(attend(q, k, kv[:, nope:], mask, rope.softmax_scale(config)))
    return np.concatenate(outputs, axis=1) @ params["wo"]


def index_scores(x_TD: np.ndarray, params: dict, config: ModelConfig, places: np.ndarray):
    """Returns the score of each key for each query, [T, T], head by head."""
    latent = rms_norm(x_TD @ params["wq_a"], params["q_norm"]["weight"], 1e-6)
    indexer, width = params["indexer"], config.index_head_dim
    key = x_TD @ indexer["wk"]
    key = key - key.mean(axis=1, keepdims=True)
    key = key / np.sqrt((key * key).mean(axis=1, keepdims=True) + 1e-6)
    key = key * indexer["k_norm"]["weight"] + indexer["k_norm"]["bias"]

    def turned(x_TY: np.ndarray) -> np.ndarray:
        R = config.qk_rope_head_dim
        first = rope.rotate_halves(x_TY[:, :R], places, config)
        return np.concatenate([first, x_TY[:, R:]], axis=1)

    weights_TI = x_TD @ indexer["weights_proj"] * config.index_n_heads**-0.5
    scores = np.zeros((len(x_TD), len(x_TD)))
    for head in range(config.index_n_heads):
        query = turned(latent @ indexer["wq_b"][:, head * width : (head + 1) * width])
        products = np.maximum(query @ turned(key).T * width**-0.5, 0.0)
        scores += weights_TI[:, head : head + 1] * products
    return scores


def chosen(scores_TT: np.ndarray, visible_TT: np.ndarray, count: int) -> np.ndarray:
    """Marks the `count` visible keys of the highest scores, one query at a time."""
    mask = np.zeros_like(visible_TT)
    for t, (scores, seen) in enumerate(zip(scores_TT, visible_TT, strict=True)):
        candidates = np.flatnonzero(seen)
        best = candidates[np.argsort(-scores[candidates], kind="stable")[:count]]
        mask[t, best] = True
    return mask


def gqa(x_TD: np.ndarray, params: dict, config: ModelConfig, segments_T: np.ndarray) -> np.ndarray:
    places, mask, width = positions(segments_T), visible(segments_T), config.qk_head_dim
    projected = {}
    for letter in "qkv":
        projected[letter] = x_TD @ params[f"w{letter}"] + (
            params[f"b{letter}"] if config.qkv_bias else 0.0
        )
    outputs = []
    for head in range(config.n_heads):
        group = head // (config.n_heads // config.kv_heads)
        q = projected["q"][:, head * width : (head + 1) * width]
        k = projected["k"][:, group * width : (group + 1) * width]
        if config.qk_norm:
            q = rms_norm(q, params["q_norm"]["weight"], config.norm_eps)
            k = rms_norm(k, params["k_norm"]["weight"], config.norm_eps)
        q, k = rope.rotate_halves(q, places, config), rope.rotate_halves(k, places, config)
        v = projected["v"][:, group * width : (group + 1) * width]
        outputs.append(attend(q, k, v, mask, rope.softmax_scale(config)))
    return np.concatenate(outputs, axis=1) @ params["wo"]

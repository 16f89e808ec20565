"""Native sparse attention (arXiv:2502.11089), one query and one head after the other."""

from __future__ import annotations

import numpy as np

from dsjax.config import ModelConfig
from tests.oracles import rope
from tests.oracles.attention import positions


def compress(tokens_UH: np.ndarray, params: dict) -> np.ndarray:
    """Equation 7's network: the keys or values of a block, to one."""
    hidden = (tokens_UH + params["position"]).reshape(-1) @ params["w_in"] + params["b_in"]
    return hidden / (1 + np.exp(-hidden)) @ params["w_out"]


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(initial=-np.inf))
    return weights / weights.sum() if len(weights) else weights


def importance(p_Z: np.ndarray, n_blocks: int, config: ModelConfig) -> list[float]:
    """Equation 9, counted from 0: entry i begins at token i * stride, block j at j * block."""
    inside, across = config.nsa_block // config.nsa_stride, config.nsa_length // config.nsa_stride
    found = []
    for block in range(n_blocks):
        total = 0.0
        for m in range(inside):
            for n in range(across):
                entry = inside * block + m - n
                if 0 <= entry < len(p_Z):
                    total += p_Z[entry]
        found.append(total)
    return found


def choose(scores: list[float], own_block: int, config: ModelConfig) -> list[int]:
    """The first block, the two nearest, and the best of the others."""
    forced = {0, own_block, max(own_block - 1, 0)}
    others = sorted(set(range(own_block + 1)) - forced, key=lambda block: -scores[block])
    return sorted([*forced, *others[: config.nsa_count - len(forced)]])


def nsa(x_TD: np.ndarray, params: dict, config: ModelConfig, segments_T: np.ndarray) -> np.ndarray:
    places, T = positions(segments_T), len(x_TD)
    N, P, H, W = config.n_heads, config.kv_heads, config.qk_head_dim, config.value_head_dim
    length, stride, size = config.nsa_length, config.nsa_stride, config.nsa_block
    scale = rope.softmax_scale(config)

    def heads(name: str, width: int) -> np.ndarray:
        return (x_TD @ params[name]).reshape(T, -1, width)

    def rotated(x_TNH: np.ndarray, places_T: np.ndarray) -> np.ndarray:
        turned = [
            rope.rotate_halves(x_TNH[:, head], places_T, config) for head in range(x_TNH.shape[1])
        ]
        return np.stack(turned, axis=1)

    q = rotated(heads("wq", H), places)
    raw_k, raw_v = heads("wk_compress", H), heads("wv_compress", W)
    slc_k, slc_v = rotated(heads("wk_select", H), places), heads("wv_select", W)
    win_k, win_v = rotated(heads("wk_window", H), places), heads("wv_window", W)
    gates = 1 / (1 + np.exp(-heads("w_gate", 3)))

    def entry(first: int, number: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = slice(first + number * stride, first + number * stride + length)
        key = compress(raw_k[tokens, group], params["compress_key"])
        key = rope.rotate_halves(key[None], np.array([number * stride]), config)[0]
        return key, compress(raw_v[tokens, group], params["compress_value"])

    out_TNW = np.zeros((T, N, W))
    for t in range(T):
        own, first = places[t], t - places[t]
        n_entries = max((own + 1 - length) // stride + 1, 0)
        for group in range(P):
            members = range(group * N // P, (group + 1) * N // P)
            entries = [entry(first, number, group) for number in range(n_entries)]
            p_Z = np.zeros(n_entries)
            for head in members:
                weights = softmax(np.array([q[t, head] @ key * scale for key, _ in entries]))
                for weight, (_, value) in zip(weights, entries, strict=True):
                    out_TNW[t, head] += gates[t, head, 0] * weight * value
                p_Z += weights
            own_block = own // size
            blocks = choose(importance(p_Z, own_block + 1, config), own_block, config)
            seen = [s for s in range(first, t + 1) if (s - first) // size in blocks]
            recent = [s for s in range(first, t + 1) if t - s < config.nsa_window]
            for head in members:
                for gate, places_, k, v in ((1, seen, slc_k, slc_v), (2, recent, win_k, win_v)):
                    weights = softmax(k[places_, group] @ q[t, head] * scale)
                    out_TNW[t, head] += gates[t, head, gate] * (weights @ v[places_, group])
    return out_TNW.reshape(T, -1) @ params["wo"]

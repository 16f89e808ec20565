"""A whole model on one sequence: the main stack, and multi-token prediction modules after it (V3
equations 21-25)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dsjax.config import ModelConfig
from tests.oracles.attention import attention, rms_norm
from tests.oracles.experts import Choice, dense, moe


class Forward(NamedTuple):
    logits_TV: np.ndarray
    mtp_logits: list[
        np.ndarray
    ]  # depth k: [T - k, V]; row i predicts token i + k + 1 (V3 equation 23)
    choices: list[
        list[Choice]
    ]  # per mixture-of-experts layer, the main stack's then the modules', per token


def at(tree: Any, index: int) -> Any:
    """One layer of a stack."""
    if isinstance(tree, dict):
        return {name: at(child, index) for name, child in tree.items()}
    return tree[index]


def layer(
    x_TD, params: dict, config: ModelConfig, segments_T
) -> tuple[np.ndarray, list[Choice] | None]:
    """A pre-norm block."""
    normed = rms_norm(x_TD, params["attn_norm"]["weight"], config.norm_eps)
    x_TD = x_TD + attention(normed, params["attn"], config, segments_T)
    normed = rms_norm(x_TD, params["ffn_norm"]["weight"], config.norm_eps)
    if "experts" not in params["ffn"]:
        return x_TD + dense(normed, params["ffn"]), None
    output, choices = moe(normed, params["ffn"], config)
    return x_TD + output, choices


def forward(
    tokens_T: np.ndarray, params: dict, config: ModelConfig, segments_T: np.ndarray | None = None
) -> Forward:
    """Runs one sequence; documents are isolated when `segments_T` is given."""
    length = len(tokens_T)
    segments_T = np.zeros(length, dtype=np.int64) if segments_T is None else segments_T
    embed = params["embed"]["weight"]
    head = embed.T if config.tie_embed else params["head"]["weight"]
    x_TD, choices = embed[tokens_T], []
    for index in range(config.n_layers):
        moe_index = index - config.n_dense_layers
        params_here = (
            at(params["dense_layers"], index)
            if moe_index < 0
            else at(params["moe_layers"], moe_index)
        )
        x_TD, routed = layer(x_TD, params_here, config, segments_T)
        choices += [routed] if routed is not None else []
    normed = rms_norm(x_TD, params["norm"]["weight"], config.norm_eps)
    hidden, mtp_logits = (normed if config.mtp_after_final_norm else x_TD), []
    for depth in range(1, config.n_mtp + 1):
        module, count = at(params["mtp"], depth - 1), length - depth
        rows = []
        for i in range(count):
            embedding = rms_norm(
                embed[tokens_T[i + depth]], module["enorm"]["weight"], config.norm_eps
            )
            state = rms_norm(hidden[i], module["hnorm"]["weight"], config.norm_eps)
            rows.append(np.concatenate([embedding, state]) @ module["eh_proj"])
        x_TD, routed = layer(np.stack(rows), module["layer"], config, segments_T[:count])
        choices += [routed] if routed is not None else []
        mtp_logits.append(rms_norm(x_TD, module["norm"]["weight"], config.norm_eps) @ head)
        hidden = x_TD  # equation 22: the next depth reads the transformer layer's output
    return Forward(normed @ head, mtp_logits, choices)

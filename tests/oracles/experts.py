"""Routing and mixture of experts, token by token: DeepSeekMoE (equations 9-11), V2 section 2.2, V3
equations 12-16."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsjax.config import ModelConfig


class Choice(NamedTuple):
    experts: list[int]  # best first
    weights: list[float]
    scores: np.ndarray  # [E] before bias


def best(values, count: int) -> list[int]:
    """Indices of the largest values, the lower index first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def route(logits_E: np.ndarray, bias_E: np.ndarray | None, config: ModelConfig) -> Choice:
    """Chooses the experts of one token."""
    if config.score_func == "sigmoid":
        scores = 1 / (1 + np.exp(-logits_E))
    else:
        scores = np.exp(logits_E - logits_E.max())
        scores = scores / scores.sum()
    selection = scores if bias_E is None else scores + bias_E
    per_group = config.n_routed_experts // config.n_expert_groups
    group_scores = []
    for group in range(config.n_expert_groups):
        members = sorted(selection[group * per_group : (group + 1) * per_group], reverse=True)
        group_scores.append(members[0] if config.group_score == "max" else sum(members[:2]))
    kept = best(group_scores, config.n_limited_groups)
    masked = [value if i // per_group in kept else -np.inf for i, value in enumerate(selection)]
    chosen = best(masked, config.n_activated_experts)
    weights = scores[chosen]
    if config.norm_topk:
        weights = weights / weights.sum()
    return Choice(chosen, list(weights * config.route_scale), scores)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def ffn(x: np.ndarray, w_gate: np.ndarray, w_up: np.ndarray, w_down: np.ndarray) -> np.ndarray:
    return (silu(x @ w_gate) * (x @ w_up)) @ w_down


def dense(x_TD: np.ndarray, params: dict) -> np.ndarray:
    return ffn(x_TD, params["w_gate"], params["w_up"], params["w_down"])


def moe(x_TD: np.ndarray, params: dict, config: ModelConfig) -> tuple[np.ndarray, list[Choice]]:
    """Shared experts on every token plus each token's routed experts."""
    experts, choices, outputs = params["experts"], [], []
    for x_D in x_TD:
        choice = route(x_D @ params["gate"]["weight"], params["gate"].get("bias"), config)
        output = np.zeros_like(x_D)
        for expert, weight in zip(choice.experts, choice.weights, strict=True):
            output += weight * ffn(
                x_D, *(experts[name][expert] for name in ("w_gate", "w_up", "w_down"))
            )
        if config.n_shared_experts:
            output += dense(x_D, params["shared"])
        choices.append(choice)
        outputs.append(output)
    return np.stack(outputs), choices

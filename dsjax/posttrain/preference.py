"""Preference training: the objectives of DPO and of reward models.

All three minimise a logistic loss of rewards:

  dpo            -log sigmoid(r(chosen) - r(rejected)), where a policy's own reward of an answer is
                 beta (log p(answer) - log p_ref(answer)), summed over the answer's tokens
                 (arXiv:2305.18290, equation 7; DeepSeek LLM's chat models, arXiv:2401.02954)
  bradley_terry  the same of a reward model's scores (R1's helpfulness, arXiv:2501.12948)
  pointwise      -log sigmoid(r) of an answer labelled good, -log sigmoid(-r) of a bad one
                 (R1's safety)

An answer is a row of its own, and the two of a pair are neighbours: rows 2i (chosen) and 2i + 1
(rejected). They are not packed, for two reasons: a step then trains on exactly as many pairs as
published batch sizes count, and attention costs the square of an answer's length, not of a row that
many share. Neither loss nor gradient depends on how pairs fall into micro-batches.

The reference's log-probabilities come with the rows: they never change, so one forward pass over
the data before training gives them. To compute them in each step would need the initial weights
beside the trained ones, 1.3 TB more for 671B parameters in bfloat16, and that pass once per epoch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.config import ModelConfig
from dsjax.config.preference import Preference
from dsjax.model.balance import BalanceWeights
from dsjax.model.head import token_nll
from dsjax.model.transformer import Hidden, Transformer
from dsjax.posttrain.reward_model import RewardModel
from dsjax.train.objective import (
    Batch,
    ForwardPass,
    Knobs,
    Metrics,
    Objective,
    Sums,
    Weights,
)


def implicit_reward(logp: jax.Array, reference: jax.Array, beta: float) -> jax.Array:
    """Returns the reward that a policy implies for an answer, given the log-probabilities of the
    answer under the policy and under the reference.
    """
    return beta * (logp - reference)


def pair_loss(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """Returns -log sigmoid(chosen - rejected) of rewards, after Bradley and Terry's model."""
    return jax.nn.softplus(rejected - chosen)


def label_loss(rewards: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns -log sigmoid(reward) where the label is 1, -log sigmoid(-reward) where it is 0."""
    return jax.nn.softplus(jnp.where(labels > 0, -rewards, rewards))


class Answers(NamedTuple):
    """What the objectives read of a batch; R rows."""

    ids: jax.Array  # int32 [..., R, T], the tokens to predict
    counted: jax.Array  # bool [..., R, T], those of the answer
    last: jax.Array  # float32 [..., R, T], 1 at the position of the answer's last token
    present: jax.Array  # float32 [..., R], 0 for rows that only fill a batch
    known: jax.Array  # float32 [..., R], reference log-probability or label


def preference(config: Preference) -> Objective:
    """Returns the objective of a config.

    A batch has, besides tokens and segment ids, `counted`, int32 [..., R, T + 1], 1 for the tokens
    of the answer, its end token included, and per row `reference` (DPO: the sum of their
    log-probabilities under the reference) or `label` (pointwise: 1 or 0). The sums are over pairs,
    or over labelled answers.
    """
    group, model = config.preference, config.shape
    known = {"dpo": "reference", "bradley_terry": None, "pointwise": "label"}[group.kind]

    def targets(batch: Batch) -> Answers:
        return _answers(batch, known)

    def weights(targets: Answers, knobs: Knobs) -> Weights:
        del knobs
        rows = targets.present.sum(axis=-1)
        counts = rows / group.rows_per_example
        loss = jnp.broadcast_to(1.0 / jnp.maximum(counts.sum(), 1.0), counts.shape)
        return Weights({"loss": loss}, rows / jnp.maximum(rows.sum(), 1.0))

    def sums(model: Transformer, hidden: Hidden, targets: Answers, knobs: Knobs) -> Sums:
        del knobs
        rewards_R = _rewards(config, model, hidden, targets)
        if group.kind == "pointwise":
            return _labelled(rewards_R, targets)
        return _compared(rewards_R, targets)

    return Objective(_forward(config, model), targets, weights, sums, _means)


def answer_logp(config: Preference) -> Objective:
    """Returns an objective whose only sum is not one: `logp`, float32 [R], the log-probability of
    each row's answer. It makes DPO's reference, from the same batches.
    """
    objective = preference(config)

    def sums(model: Transformer, hidden: Hidden, targets: Answers, knobs: Knobs) -> Sums:
        del knobs
        return {"logp": _logp(config, model, hidden, targets)}

    return objective._replace(targets=lambda batch: _answers(batch, None), sums=sums)


def _answers(batch: Batch, known: str | None) -> Answers:
    counted = batch["counted"]
    # An answer of several turns counts in stretches; its end is that of the last.
    last = (counted > 0) & (jnp.cumsum(counted, axis=-1) == counted.sum(axis=-1, keepdims=True))
    present = (counted.max(axis=-1) > 0).astype(jnp.float32)
    return Answers(
        batch["tokens"][..., 1:],
        counted[..., 1:] > 0,
        last[..., :-1].astype(jnp.float32),
        present,
        batch[known] if known else jnp.zeros_like(present),
    )


def _forward(config: Preference, model: ModelConfig) -> ForwardPass:
    balance = BalanceWeights.of(config.train, model, isolated=True)
    return ForwardPass(True, False, balance, config.train.remat)


def _logp(config: Preference, model: Transformer, hidden: Hidden, targets: Answers) -> jax.Array:
    chunk = config.train.loss_chunk
    nll_RT = token_nll(hidden.main_BTD, model.head_weight(), targets.ids, model.policy, chunk)
    # Selected, not multiplied: a token that does not count may be impossible.
    return -jnp.where(targets.counted, nll_RT, 0.0).sum(axis=-1)


def _rewards(config: Preference, model: Transformer, hidden: Hidden, targets: Answers) -> jax.Array:
    if config.preference.kind == "dpo":
        logp_R = _logp(config, model, hidden, targets)
        return implicit_reward(logp_R, targets.known, config.preference.beta)
    assert isinstance(model, RewardModel)
    return model.scores(hidden.main_BTD, targets.last)


def _compared(rewards_R: jax.Array, targets: Answers) -> Sums:
    (chosen, rejected), present = rewards_R.reshape(-1, 2).T, targets.present[::2]
    values = {
        "loss": pair_loss(chosen, rejected),
        "right": (chosen > rejected).astype(jnp.float32),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    return _sums(values, present)


def _labelled(rewards_R: jax.Array, targets: Answers) -> Sums:
    good = targets.known > 0
    values = {
        "loss": label_loss(rewards_R, targets.known),
        "right": ((rewards_R > 0) == good).astype(jnp.float32),
        "reward": rewards_R,
        "good": good.astype(jnp.float32),
    }
    return _sums(values, targets.present)


def _sums(values: Sums, present: jax.Array) -> Sums:
    return {name: (present * value).sum() for name, value in values.items()} | {
        "examples": present.sum()
    }


def _means(sums: Sums) -> Metrics:
    count = jnp.maximum(sums["examples"], 1.0)
    means = {name: total / count for name, total in sums.items() if name != "examples"}
    return {"accuracy" if name == "right" else name: mean for name, mean in means.items()}

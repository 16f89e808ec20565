"""The policy as a training objective: `policy_loss` over packed rows, and log-probabilities alone.

A batch holds, beside `tokens` and `segment_ids`, arrays of the same shape whose value at a token
describes that token (not the one it predicts):

  weights     float32, in the loss; 0 for prompts and padding
  advantages  float32
  old, ref    float32 log-probabilities by the policy that answered, as the trainer computes them,
              and by the reference; absent where not needed
  samp        float32 log-probabilities by the engine
  kept        uint32 [..., X], the ids among which the engine drew, where top-k or top-p cut others
              off: all log-probabilities are of the distribution over these (V3.2, section 3.1)

Several answers share a row with isolated attention. Segment ids number them within their row, so
they also tell `policy_loss` which tokens belong to one answer.

MTP modules rest: they neither run nor train. Router biases rest too (`bias_update_speed` 0): with
the choices replayed, counts would steer nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config.reinforcement import Reinforcement
from dsjax.model.balance import BalanceWeights
from dsjax.model.head import token_nll_and_entropy
from dsjax.model.transformer import Hidden, Transformer
from dsjax.parallel.context import restore
from dsjax.parallel.sharding import constrain
from dsjax.posttrain.objective import PolicyOptions, policy_loss
from dsjax.train.objective import (
    Batch,
    ForwardPass,
    Knobs,
    Metrics,
    Objective,
    Sums,
    Weights,
    read_batch,
    read_experts,
    replayed,
)
from dsjax.train.step import split


class Targets(NamedTuple):
    """The tokens to predict and what is known of them, [..., B, T]."""

    ids: jax.Array
    outputs: jax.Array
    ran: jax.Array  # whether the engine ran the token before, as it does not a segment's last
    weights: jax.Array
    advantages: jax.Array
    samp: jax.Array
    old: jax.Array | None
    ref: jax.Array | None
    kept: jax.Array | None  # [..., X, B, T]


def options_of(config: Reinforcement) -> PolicyOptions:
    """Returns the options of the loss."""
    rl = config.rl
    return PolicyOptions(
        epsilon=rl.epsilon,
        epsilon_high=rl.epsilon_high,
        beta=rl.beta,
        kl=rl.kl,
        ratio=rl.ratio,
        truncate=rl.truncate,
        keep=(rl.keep[0], rl.keep[1]) if rl.keep else (0.0, 0.0),
        off_policy=rl.off_policy,
    )


def _forward_pass(config: Reinforcement) -> ForwardPass:
    train = config.train
    asked = (
        train.sequence_balance, train.expert_balance, train.device_balance,
        train.communication_balance,
    )  # fmt: skip
    balance = BalanceWeights.of(train, config.shape, isolated=True) if any(asked) else None
    return ForwardPass(isolate=True, mtp=False, balance=balance, remat=train.remat)


def policy_objective(config: Reinforcement) -> Objective:
    """Returns the objective of reinforcement learning. It asks for no knobs."""
    options, chunk = options_of(config), config.train.loss_chunk
    temperature, replays = config.rl.temperature, config.replays

    def targets(batch: Batch) -> Targets:
        def own(name: str) -> Any:
            return batch[name][..., 1:] if name in batch else None

        outputs = batch["segment_ids"]
        ran = (outputs[..., 1:] == outputs[..., :-1]) & (outputs[..., 1:] > 0)
        rest = {name: own(name) for name in ("weights", "advantages", "samp", "old", "ref")}
        return Targets(own("tokens"), outputs[..., 1:], ran, kept=_kept(batch), **rest)

    def weights(targets: Targets, knobs: Knobs) -> Weights:
        del knobs
        counts = (targets.weights != 0).astype(jnp.float32).sum(axis=(1, 2))
        # The tokens' weights are those of the whole batch already.
        shares = counts / jnp.maximum(counts.sum(), 1.0)
        return Weights({"loss": jnp.ones_like(counts)}, shares)

    def sums(model: Transformer, hidden: Hidden, targets: Targets, knobs: Knobs) -> Sums:
        del knobs
        nll, entropy = token_nll_and_entropy(
            hidden.main_BTD, model.head_weight(), targets.ids, model.policy, chunk, temperature,
            _each(targets.kept),
        )  # fmt: skip
        found = policy_loss(
            -nll,
            targets.old,
            targets.advantages,
            targets.weights,
            options,
            outputs=targets.outputs,
            ref=targets.ref,
            samp=targets.samp,
        )
        entropy = jnp.where(targets.weights != 0, entropy, 0.0).sum()
        sums = {"loss": found.loss, "entropy": entropy, **found.sums}
        if replays and hidden.routing is not None:
            differs_LBT = (hidden.routing.overruled_BT & targets.ran[None]).astype(jnp.float32)
            routers = targets.ran.sum(dtype=jnp.float32) * len(differs_LBT)
            sums |= {"routers_differ": differs_LBT.sum(), "routers": routers}
        return sums

    return Objective(_forward_pass(config), targets, weights, sums, _metrics)


def _metrics(sums: Sums) -> Metrics:
    tokens = jnp.maximum(sums["tokens"], 1.0)
    low, high = sums["clipped_low"] / tokens, sums["clipped_high"] / tokens
    metrics = {
        "loss": sums["loss"],
        "entropy": sums["entropy"] / tokens,
        "surprise": sums["surprise"] / tokens,
        "clipped": low + high,
        "clipped_low": low,
        "clipped_high": high,
        "engine_gap": sums["gap"] / tokens,
        "engine_gap_max": sums["gap_max"],
        "rho_max": sums["rho_max"],
        "update_tokens": sums["tokens"],
    }
    if "routers" in sums:
        metrics["routers_differ"] = sums["routers_differ"] / jnp.maximum(sums["routers"], 1.0)
    optional = {"kl": "k3", "kl_k1": "k1", "off_policy": "off_policy"}
    return metrics | {name: sums[key] / tokens for name, key in optional.items() if key in sums}


def log_probabilities(
    config: Reinforcement, declared: Transformer
) -> Callable[[tuple[nnx.State, nnx.State], Batch], jax.Array]:
    """Builds ((parameters, router state), batch) -> the log-probability of each token given those
    before it in its row, at the temperature of the answers, float32 of the shape of `tokens`,
    [minibatches, micro-batches, B, T + 1].

    Values of prompts and of padding have no meaning; weights of 0 leave them out.
    """
    objective = policy_objective(config)._replace(targets=_next_tokens)
    chunk, temperature = config.train.loss_chunk, config.rl.temperature
    structure, *_ = split(declared)

    def score(weights: tuple[nnx.State, nnx.State], batch: Batch) -> jax.Array:
        model = nnx.merge(structure, *weights)
        shape = batch["tokens"].shape
        read = ("tokens", "segment_ids", "experts", "kept")
        batch = {
            name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in read if name in batch
        }
        inputs, targets = read_batch(objective, declared, batch)

        def of_micro_batch(arrays: Any) -> jax.Array:
            inputs, (ids_BT, kept), experts = arrays
            hidden = model.forward(inputs, experts_LBTK=replayed(experts))
            nll, _ = token_nll_and_entropy(
                hidden.main_BTD, model.head_weight(), ids_BT, model.policy, chunk, temperature,
                _each(kept),
            )  # fmt: skip
            return constrain(jnp.pad(restore(-nll), ((0, 0), (1, 0))), "batch", "tokens")

        found = jax.lax.map(of_micro_batch, (inputs, targets, read_experts(batch)))
        return constrain(found.reshape(shape), *("micro_batches",) * 2, "batch", "tokens")

    return score


def _next_tokens(batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    return batch["tokens"][..., 1:], _kept(batch)


def _kept(batch: Batch) -> jax.Array | None:
    """Returns the sets of ids of the tokens to predict, [..., X, B, T]."""
    return jnp.moveaxis(batch["kept"], -1, -3)[..., 1:] if "kept" in batch else None


def _each(kept_XBT: jax.Array | None) -> jax.Array | None:
    """Returns them as [B, T, X]."""
    return None if kept_XBT is None else jnp.moveaxis(kept_XBT, 0, -1)

"""The objective of reinforcement learning, a pure function of log-probabilities.

One function covers GRPO as DeepSeekMath and R1 print it (the defaults) and its relatives:

  GRPO        defaults; beta=0.04 and average "sequence" (arXiv:2402.03300, equations 3 and 4)
  R1          epsilon=10, beta=0.001 (arXiv:2501.12948)
  DAPO        epsilon_high=0.28, beta=0, average "token" (arXiv:2503.14476)
  Dr. GRPO    beta=0, advantages without their deviation, average "constant" (arXiv:2503.20783)
  GSPO        ratio="sequence", epsilon=3e-4, epsilon_high=4e-4 (arXiv:2507.18071)
  V3.2        kl="rho_k3", off_policy, average "token" (arXiv:2512.02556, section 3.1)

How tokens are averaged is data: `dsjax.posttrain.advantages.token_weights`. The functions compute
in the type of their arguments, so the same lines train in float32 and are tested in float64.

KL in the loss. `k3` is the papers' estimate; on policy its gradient is that of KL(ref, new).
`rho_k3`, differentiated through rho too, has the gradient of KL(new, ref) on and off policy. k1,
the plain difference of log-probabilities, is refused: its expected gradient on policy is zero, so
it would not regularize at all.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

_MOST = 20.0  # of a difference of log-probabilities before exp, which would overflow


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """Which of the relatives is meant. 0 turns `beta`, `truncate`, `keep` and `off_policy` off.

    Attributes:
      epsilon, epsilon_high: the ratio is clipped to 1 - epsilon ... 1 + epsilon_high; an
        epsilon_high of 0 means epsilon.
      beta: weight of the KL divergence from the reference.
      kl: its estimate.
      ratio: of each "token", or one per output, the geometric mean of its tokens' ("sequence").
      truncate: where the engine's log-probabilities differ from the trainer's, a token's policy
        term is multiplied by min(exp(old - samp), truncate): truncated importance sampling.
      keep: (low, high); tokens with exp(old - samp) outside have no policy term, the others have it
        multiplied by that ratio (IcePop). Not together with `truncate`.
      off_policy: outputs with a negative advantage whose mean of samp - new exceeds this have no
        policy term (V3.2).

    Raises:
      ValueError: an option is out of range or has no meaning.
    """

    epsilon: float = 0.2
    epsilon_high: float = 0.0
    beta: float = 0.0
    kl: Literal["k3", "rho_k3"] = "k3"
    ratio: Literal["token", "sequence"] = "token"
    truncate: float = 0.0
    keep: tuple[float, float] = (0.0, 0.0)
    off_policy: float = 0.0

    def __post_init__(self) -> None:
        if self.kl == "k1":
            raise ValueError(
                "kl='k1' in the loss has an expected gradient of zero on policy, so it would not "
                "hold the policy near the reference; use k3 or rho_k3"
            )
        if self.kl not in ("k3", "rho_k3") or self.ratio not in ("token", "sequence"):
            raise ValueError(
                f"kl={self.kl!r} must be k3 or rho_k3, and ratio={self.ratio!r} token or sequence"
            )
        numbers = (self.epsilon_high, self.beta, self.truncate, *self.keep, self.off_policy)
        if self.epsilon <= 0 or min(numbers) < 0:
            raise ValueError(f"{self}: epsilon must be positive, the other numbers not negative")
        if self.keep[0] > self.keep[1] or (self.truncate and self.keep[1]):
            raise ValueError(
                f"truncate={self.truncate} and keep={self.keep}: set one of the two, keep as "
                "(low, high)"
            )


class PolicyLoss(NamedTuple):
    """The loss and what else is worth reporting.

    Attributes:
      loss: scalar, the sum over tokens of weight times term.
      terms: [...], the unweighted loss of each token, 0 where the weight is 0.
      sums: scalars over tokens of non-zero weight: `tokens`; `surprise`, -new; `k1`, new - ref, and
        `k3`, two estimates of the KL divergence; `clipped_low` and `clipped_high`, tokens whose
        gradient the clipping removes; `off_policy`, tokens without a policy term by that option or
        by `keep`; `gap`, |samp - old|. Not added up are `rho_max` and `gap_max`, the largest ratio
        and the largest |samp - old|. Those without their input are absent.
    """

    loss: jax.Array
    terms: jax.Array
    sums: dict[str, jax.Array]


def policy_loss(
    new: jax.Array,
    old: jax.Array | None,
    advantages: jax.Array,
    weights: jax.Array,
    options: PolicyOptions = PolicyOptions(),
    *,
    outputs: jax.Array | None = None,
    ref: jax.Array | None = None,
    samp: jax.Array | None = None,
) -> PolicyLoss:
    """Computes the loss of some outputs' tokens; differentiate it with respect to `new`.

    loss = sum over tokens of weight * (beta * KL - min(rho A, clip(rho, 1 - epsilon, 1 +
    epsilon_high) A)), with rho = exp(new - old).

    All arrays are [..., T], several outputs may share a row. Where the weight is 0 (prompts,
    padding) no other value has any effect.

    Args:
      new: log-probabilities by the trained policy.
      old: by the policy that the outputs were drawn from, as the trainer computes them; None: the
        policy has not changed since, so they equal `new`, without its gradient.
      advantages: of each token; equal for all of an output if its outcome is what was rewarded.
      weights: as `token_weights` says, 0 for what is not part of an output.
      outputs: int32 below T + 1, which output of its row each token belongs to; None: each row is
        one output. Only `ratio="sequence"` and `off_policy` read it.
      ref: by the reference policy; needed if beta is not 0.
      samp: by the engine that drew the outputs.

    Raises:
      ValueError: an option needs an argument that is not there.
    """
    _check(options, ref, samp)
    counted = weights != 0

    def safe(x: jax.Array) -> jax.Array:
        return jnp.where(counted, x, 0)

    def count(marked: jax.Array) -> jax.Array:
        return (marked & counted).astype(new.dtype).sum()

    new, advantages = safe(new), safe(advantages)
    old = jax.lax.stop_gradient(new) if old is None else safe(old)
    samp = None if samp is None else safe(samp)
    log_rho = new - old
    if options.ratio == "sequence":
        log_rho = _output_mean(log_rho, counted, outputs)
    rho = jnp.exp(jnp.clip(log_rho, -_MOST, _MOST))
    low, high = 1 - options.epsilon, 1 + (options.epsilon_high or options.epsilon)
    policy = -jnp.minimum(rho * advantages, jnp.clip(rho, low, high) * advantages)
    sums = {
        "tokens": count(counted),
        "surprise": -new.sum(),
        "clipped_low": count((rho < low) & (advantages < 0)),
        "clipped_high": count((rho > high) & (advantages > 0)),
        "rho_max": safe(rho).max(),
    }
    factor = _correction(old, samp, options)
    if options.off_policy:
        drawn = jax.lax.stop_gradient((old if samp is None else samp) - new)
        behind = _output_mean(drawn, counted, outputs)
        factor = jnp.where((advantages >= 0) | (behind <= options.off_policy), factor, 0)
    terms = jnp.where(factor > 0, factor * policy, 0)
    if options.keep[1] or options.off_policy:
        sums["off_policy"] = count(factor == 0)
    if samp is not None:
        gap = jnp.abs(samp - old)
        sums |= {"gap": gap.sum(), "gap_max": gap.max()}
    if ref is not None:
        behind = jnp.clip(safe(ref) - new, -_MOST, _MOST)
        k3 = jnp.exp(behind) - behind - 1
        sums |= {"k1": -behind.sum(), "k3": k3.sum()}
        terms += options.beta * (rho * k3 if options.kl == "rho_k3" else k3)
    terms = safe(terms)
    return PolicyLoss((weights * terms).sum(), terms, jax.lax.stop_gradient(sums))


def _correction(old: jax.Array, samp: jax.Array | None, options: PolicyOptions) -> jax.Array:
    """Returns what a token's policy term is multiplied by, as the engine drew it with another
    probability than the trainer's; 0 leaves the token out.
    """
    if samp is None or not (options.truncate or options.keep[1]):
        return jnp.ones_like(old)
    factor = jnp.exp(jnp.clip(old - samp, -_MOST, _MOST))
    if options.truncate:
        return jnp.minimum(factor, options.truncate)
    low, high = options.keep
    return jnp.where((factor >= low) & (factor <= high), factor, 0)


def _check(options: PolicyOptions, ref: jax.Array | None, samp: jax.Array | None) -> None:
    if options.beta and ref is None:
        raise ValueError(f"beta={options.beta} needs the reference's log-probabilities, ref")
    if (options.truncate or options.keep[1]) and samp is None:
        raise ValueError(
            f"truncate={options.truncate}, keep={options.keep} need the engine's "
            "log-probabilities, samp"
        )


def _output_mean(x: jax.Array, counted: jax.Array, outputs: jax.Array | None) -> jax.Array:
    """Gives each token the mean over the counted tokens of its output."""
    counts = counted.astype(x.dtype)
    if outputs is None:
        sums, n = (y.sum(axis=-1, keepdims=True) for y in (x * counts, counts))
        return jnp.broadcast_to(sums / jnp.maximum(n, 1), x.shape)

    def of_row(x_T: jax.Array, counts_T: jax.Array, outputs_T: jax.Array) -> jax.Array:
        def add(y_T: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(y_T, outputs_T, num_segments=x_T.shape[0] + 1)

        return (add(x_T * counts_T) / jnp.maximum(add(counts_T), 1))[outputs_T]

    rows = (y.reshape(-1, y.shape[-1]) for y in (x, counts, outputs))
    return jax.vmap(of_row)(*rows).reshape(x.shape)

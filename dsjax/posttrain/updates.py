"""The updates of one step: all minibatches of a rollout in one program, and the reference policy.

The state is a training state with the reference beside it, so that checkpoints hold what a resumed
run needs to the bit; a reference that is replaced during a run cannot be had from anywhere else. It
is kept as generation reads weights (`dsjax.posttrain.rollout.generating`), which in bfloat16 is
half of a copy of the masters.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.model.transformer import Transformer
from dsjax.parallel.compilation import Compiled
from dsjax.posttrain.rollout import generating, generating_shapes
from dsjax.train.objective import LARGEST, Batch, Knobs, Metrics
from dsjax.train.step import TrainState

RENEW = "renew_reference"  # a knob, 1 in the steps after which the reference is replaced
# Of several minibatches' numbers these are added up, and of those with names that end in LARGEST
# the largest is taken; of the others the mean is reported.
_ADDED = ("update_tokens", "dropped_tokens")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyState:
    """A `TrainState` and the reference policy's parameters; None where no KL is measured."""

    params: nnx.State
    router: nnx.State
    optimizer: Any
    reference: nnx.State | None

    @property
    def trained(self) -> TrainState:
        return TrainState(self.params, self.router, self.optimizer)


def with_reference(declared: Transformer, state: TrainState, *, keep: bool) -> PolicyState:
    """Returns the first state of a run, whose reference is the policy it begins with.

    Args:
      state: arrays, or their shapes and placement.
      keep: whether a reference is needed.
    """
    reference = None
    if keep and isinstance(jax.tree.leaves(state.params)[0], jax.ShapeDtypeStruct):
        reference = generating_shapes(declared, state.params)
    elif keep:
        placement = jax.tree.map(lambda leaf: leaf.sharding, state.params)

        # Copied: the step is given the buffers of the parameters.
        def copy(params: nnx.State) -> nnx.State:
            return jax.tree.map(jnp.copy, generating(declared, params))

        reference = jax.jit(copy, out_shardings=placement)(state.params)
    return PolicyState(state.params, state.router, state.optimizer, reference)


def all_minibatches(
    step: Callable[[TrainState, Batch, Knobs], tuple[TrainState, Metrics]], declared: Transformer
) -> Callable[[PolicyState, Batch, Knobs], tuple[PolicyState, Metrics]]:
    """Makes of a training step one that takes arrays [minibatches, ...] and updates once for each,
    in order. Metrics are those of all updates together.
    """

    def run(state: PolicyState, batch: Batch, knobs: Knobs) -> tuple[PolicyState, Metrics]:
        renew = knobs[RENEW]
        knobs = {name: value for name, value in knobs.items() if name != RENEW}

        def update(trained: TrainState, minibatch: Batch) -> tuple[TrainState, Metrics]:
            return step(trained, minibatch, knobs)

        if len(batch["tokens"]) == 1:
            trained, metrics = update(state.trained, jax.tree.map(lambda x: x[0], batch))
        else:
            trained, each = jax.lax.scan(update, state.trained, batch)
            metrics = {name: _combined(name, values) for name, values in each.items()}
        reference = state.reference
        if reference is not None:
            reference = jax.tree.map(
                lambda new, old: jnp.where(renew > 0, new, old),
                generating(declared, trained.params),
                reference,
            )
        return PolicyState(trained.params, trained.router, trained.optimizer, reference), metrics

    return run


def _combined(name: str, values: jax.Array) -> jax.Array:
    if name == "skipped":
        return values.any()
    if name.endswith(LARGEST):
        return values.max(axis=0)
    return values.sum(axis=0) if name in _ADDED else values.mean(axis=0)


class Timed:
    """A compiled step that waits for its result and reports its seconds and tokens per second.

    Nothing is lost by waiting: the next step begins with a rollout, which needs the new weights.
    """

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled

    @property
    def seconds(self) -> float:
        """Time spent on compilation so far."""
        return self._compiled.seconds

    def is_compiled(self, batch: Any) -> bool:
        return self._compiled.is_compiled(batch)

    def compile(self, state: Any, batch: Any, *rest: Any) -> None:
        self._compiled.compile(state, batch, *rest)

    def __call__(self, state: Any, batch: Any, *rest: Any) -> tuple[Any, Metrics]:
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(self._compiled(state, batch, *rest))
        seconds = time.perf_counter() - began
        rate = float(metrics["update_tokens"]) / seconds
        timed = {"update_seconds": seconds, "update_tokens_per_second": rate}
        return state, metrics | {name: np.float32(value) for name, value in timed.items()}

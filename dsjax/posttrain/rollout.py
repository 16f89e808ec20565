"""Rollouts: the model answers questions, on the devices and with the arrays that it trains on.

A draw depends on seed and position alone, so answers are the same whatever runs beside them, on
whatever mesh; a resumed run draws again what an interrupted one had drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsjax.data.shuffling import mix, stream_key
from dsjax.generate.engine import Engine, Statistics
from dsjax.generate.request import Request
from dsjax.generate.sampling import Sampling
from dsjax.model.layers import LAYER_AXES
from dsjax.model.parameters import shardings
from dsjax.model.transformer import Transformer
from dsjax.parallel.sharding import generation_spec
from dsjax.train.step import split


class Answer(NamedTuple):
    """What the model added to a prompt.

    Attributes:
      tokens: the end token included, if there is one.
      logprobs: float32 [tokens], under the distribution that each was drawn from.
      experts: int32 [prompt + tokens - 1, L, K], chosen for all tokens that were run, that is all
        but the last; None if not asked for.
      ended: whether the model ended it; else it was cut off.
      kept: uint32 [tokens, X], the ids among which each was drawn (`dsjax.model.token_sets`); None
        if not asked for.
    """

    tokens: tuple[int, ...]
    logprobs: np.ndarray
    experts: np.ndarray | None
    ended: bool
    kept: np.ndarray | None = None


def seeds(purpose: str, seed: int, step: int, count: int) -> list[int]:
    """Returns the seeds of a step's answers, in [0, 2**32)."""
    mixed = mix(stream_key(purpose, seed, step), np.arange(count, dtype=np.uint64))
    return (mixed >> np.uint64(32)).tolist()


def generating(declared: Transformer, params: nnx.State) -> nnx.State:
    """Returns parameters as generation reads them: matrices in the type in which the trainer
    multiplies them, the router's and all vectors as float32. A pure function of arrays.

    The same numbers as the trainer's, since it casts in the same way at use, from half the memory.
    """
    travels = declared.policy.travels(np.float32)

    def cast(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata()["axes"]
        is_matrix = sum(axis not in LAYER_AXES for axis in axes) >= 2
        if not is_matrix or "router_embed" in axes:
            return variable
        return variable.copy(variable.get_value().astype(travels))

    return jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def generating_shapes(declared: Transformer, params: nnx.State) -> nnx.State:
    """Returns the shapes and types of `generating`, placed as the parameters are."""
    shapes = jax.eval_shape(lambda params: generating(declared, params), params)
    return jax.tree.map(
        lambda new, own: jax.ShapeDtypeStruct(new.shape, new.dtype, sharding=own.sharding),
        shapes,
        params,
    )


class Rollouts:
    """Answers questions with the weights of the moment."""

    def __init__(
        self,
        declared: Transformer,
        *,
        stop_ids: frozenset[int],
        max_batch: int,
        speculative: bool,
        replay: bool,
        mesh: Mesh | None = None,
    ) -> None:
        """
        Args:
          declared: the model without values.
          max_batch: how many answers are generated at the same time; 0: all.
          replay: whether to report the chosen experts.
          mesh: to generate on, of the devices that hold the weights, in the same order
            (`dsjax.parallel.mesh.regrouped`); None: as they lie.

        Raises:
          ValueError: a parameter does not divide over the mesh.
        """
        self._declared, self._stop_ids, self._replay = declared, stop_ids, replay
        self._max_batch, self._speculative = max_batch or None, speculative
        self._engine: Engine | None = None
        self._move = None if mesh is None else moving(declared, mesh)
        self._move_seconds = 0.0

    @property
    def costs(self) -> dict[str, float]:
        """What the latest answers cost beside their generation, by name: `move_seconds`, for which
        the weights were on their way to another mesh.
        """
        return {} if self._move is None else {"move_seconds": self._move_seconds}

    @property
    def statistics(self) -> Statistics:
        """What the latest answers cost."""
        assert self._engine is not None
        return self._engine.statistics

    def answer(
        self,
        params: nnx.State,
        router: nnx.State,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        own_seeds: Sequence[int],
        max_new_tokens: int,
        *,
        kept: bool = False,
    ) -> list[Answer]:
        """Answers each prompt once.

        Args:
          params: as `generating` returns them; the engine reads these very arrays, unless it has a
            mesh of its own.
          own_seeds: of each prompt; `sampling.seed` is not read.
          kept: whether to report the ids among which tokens were drawn.
        """
        requests = [
            Request(
                prompt=tuple(prompt),
                max_new_tokens=max_new_tokens,
                sampling=Sampling(
                    sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, seed
                ),
                stop_ids=self._stop_ids,
                logprobs=True,
                experts=self._replay,
                kept=kept,
            )
            for prompt, seed in zip(prompts, own_seeds, strict=True)
        ]
        if self._move is not None:
            began = time.perf_counter()
            params, router = jax.block_until_ready(self._move((params, router)))
            self._move_seconds = time.perf_counter() - began
        engine = self._loaded(params, router)
        outputs = engine.complete(requests)
        engine.release()  # updates need the memory
        return [
            Answer(
                tuple(output.tokens),
                np.asarray(output.report.sampled_logprobs, np.float32),
                output.report.experts,
                output.finish == "stop",
                output.report.kept,
            )
            for output in outputs
        ]

    def _loaded(self, params: nnx.State, router: nnx.State) -> Engine:
        """Returns the engine with these weights."""
        structure, *_ = split(self._declared)
        model = nnx.merge(structure, params, router)
        if self._engine is None:
            self._engine = Engine(
                model, speculative=self._speculative, max_batch=self._max_batch, streaming=False
            )
        else:
            self._engine.load(model)
        return self._engine


def moving(
    declared: Transformer, mesh: Mesh
) -> Callable[[tuple[nnx.State, nnx.State]], tuple[nnx.State, nnx.State]]:
    """Returns one program that lays parameters, as `generating` returns them, and router state out
    over a mesh of the devices that hold them, in the same order. Nothing passes through the host.

    Raises:
      ValueError: a parameter does not divide over the mesh.
    """
    _, params, router = split(declared)
    cast = jax.eval_shape(lambda params: generating(declared, params), params)
    placement = tuple(shardings(part, mesh, generation_spec) for part in (cast, router))
    return jax.jit(lambda weights: weights, out_shardings=placement)


def casting(declared: Transformer, mesh: Mesh) -> Callable[[nnx.State], nnx.State]:
    """Returns `generating` as one program over a mesh. Where no type changes, it returns its
    argument.
    """
    _, shapes, _ = split(declared)
    cast = jax.eval_shape(lambda params: generating(declared, params), shapes)
    pairs = zip(jax.tree.leaves(cast), jax.tree.leaves(shapes), strict=True)
    if all(new.dtype == old.dtype for new, old in pairs):
        return lambda params: params
    placement = shardings(cast, mesh)
    return jax.jit(lambda params: generating(declared, params), out_shardings=placement)

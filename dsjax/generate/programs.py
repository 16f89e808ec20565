"""Compiled programs and the weights that they run with."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.generate import decoding, pages
from dsjax.model.cache import check_split
from dsjax.model.transformer import Transformer
from dsjax.parallel.sharding import parts


class Programs:
    """Functions of a model, each compiled once per combination of argument shapes.

    Attributes:
      model: the current weights. They are an argument of every program, hence replaceable;
        their shapes alone after `release`.
      mesh: the mesh that the model is sharded over; None for a single device.
    """

    def __init__(self, model: Transformer) -> None:
        """Raises ValueError if the mesh would split a cache that stays whole."""
        self.model = model
        self._weights = model.for_decoding()  # as the programs take them
        self.mesh = _mesh(model)
        check_split(model.config, self.mesh)
        self._layout = _layout(model)
        self._compiled: dict[Any, Any] = {}

    @property
    def on_gpu(self) -> bool:
        return self.model.policy.target.kind == "gpu"

    @property
    def batch_parts(self) -> int:
        """Returns the number of parts that the rows of a batch are split into."""
        return parts("batch", self.mesh) if self.mesh else 1

    def load(self, model: Transformer) -> None:
        """Replaces the weights without recompiling anything.

        Raises:
          ValueError: the new model differs in config, precision, dtype or placement.
        """
        layout = _layout(model)
        if jax.tree.structure(layout) != jax.tree.structure(self._layout):
            raise ValueError(
                "the new weights belong to a model with another config or precision than the "
                "engine's; make a new Engine for it"
            )
        pairs = zip(jax.tree.leaves(layout), jax.tree.leaves(self._layout), strict=True)
        if wrong := [f"{found} for {own}" for found, own in pairs if found != own]:
            raise ValueError(
                f"{len(wrong)} of the new weights differ from those that the engine's programs are "
                f"compiled for, such as {wrong[0]}; cast and place them alike"
            )
        self.model, self._weights = model, model.for_decoding()

    def release(self) -> None:
        """Lets go of the weights, whose memory is free once nobody else holds them. Nothing runs
        until others are loaded.
        """
        self.model = self._weights = self._layout

    def placed(self, tree: Any) -> Any:
        """Copies weights to where these programs have theirs."""
        return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, self._layout))

    def received(self, sent: Any) -> Any:
        """Copies arrays that are whole on each device of other programs to every device of these.

        Asynchronous, and from device to device: JAX would go through the host if the layouts
        differed.
        """
        own = jax.tree.leaves(self._layout)[0].sharding
        return jax.device_put(sent, NamedSharding(self.mesh, PartitionSpec()) if self.mesh else own)

    def compiled(
        self, function: Callable[..., Any], *arguments: Any, **static: Any
    ) -> Callable[[], Any]:
        """Returns the call `function(model, *arguments, **static)`, compiled now if these shapes
        are new. The call donates the first argument, a carry.
        """
        shapes = (leaf.shape for leaf in jax.tree.leaves(arguments))
        key = (function, *sorted(static.items()), *shapes)
        if key not in self._compiled:
            jitted = jax.jit(
                functools.partial(function, **static),
                donate_argnums=(1,) if arguments else (),
                out_shardings=self._placement(function, arguments),
            )
            under_mesh = jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()
            with under_mesh:
                program = jitted.lower(self._weights, *arguments).compile()
            self._compiled[key] = self._under_mesh(jitted) if self._in_half_bytes else program
        return functools.partial(self._compiled[key], self._weights, *arguments)

    def _under_mesh(self, jitted: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a call of what is compiled already, in which jit finds its own program again."""

        def run(*arguments: Any) -> Any:
            with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
                return jitted(*arguments)

        return run

    @property
    def _in_half_bytes(self) -> bool:
        """Tells whether weights are int4 on a CPU. Of such arrays jax (0.10.2) says that they take
        whole bytes, and a program that is called as compiled ahead of time refuses them.
        """
        return any(
            leaf.dtype == ml_dtypes.int4 and next(iter(leaf.sharding.device_set)).platform == "cpu"
            for leaf in jax.tree.leaves(self._layout)
        )

    def _placement(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Returns the shardings of a function's results; None leaves them to the compiler."""
        if self.mesh is None or not arguments:
            return None
        # The carry stays where it came from, or the next program could not take it: the compiler
        # prefers the layout of weights that the pipeline's ranks share to a loop's own constraint.
        carry = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
        if function not in (decoding.prefill, decoding.decode, pages.take, pages.send):
            return carry
        # The other results are replicated: every process reads all of them.
        return carry, NamedSharding(self.mesh, PartitionSpec())


def _layout(model: Transformer) -> Any:
    """Returns shape, dtype and sharding of each array."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), model
    )


def _mesh(model: Transformer) -> Mesh | None:
    sharding = jax.tree.leaves(model)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None

"""What derives from the parameters' declarations: initial values, shardings, and a list."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsjax.parallel.sharding import LookUp, gather_for_use, partition_spec, stored_spec
from dsjax.precision.policy import Policy

AnyModule = TypeVar("AnyModule", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A parameter as its module declared it."""

    path: str  # dotted, as in a checkpoint
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str, ...]
    kind: type[nnx.Variable]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def _is_variable(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)


def _path(keys: tuple[Any, ...]) -> str:
    return ".".join(
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in keys
    )


def declarations(model: nnx.Module) -> list[Declaration]:
    """Lists the parameters of a declared or an initialised model, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_variable)
    return [
        Declaration(
            _path(keys),
            tuple(leaf.get_value().shape),
            leaf.get_value().dtype,
            leaf.get_metadata()["axes"],
            type(leaf),
        )
        for keys, leaf in leaves
    ]


def initialize(model: AnyModule, key: jax.Array) -> AnyModule:
    """Initialises a declared model; each value depends only on the key and its own path."""

    def make(keys: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        metadata = variable.get_metadata()
        declared = variable.get_value()
        own_key = jax.random.fold_in(key, zlib.crc32(_path(keys).encode()) & 0x7FFFFFFF)
        return variable.copy(metadata["init"](own_key, declared.shape, declared.dtype))

    return jax.tree_util.tree_map_with_path(make, model, is_leaf=_is_variable)


def partition_specs(module: AnyModule, mesh: Mesh | AbstractMesh) -> AnyModule:
    """Returns a module's tree with a PartitionSpec for each parameter.

    Args:
      module: may be one layer of a stack.
    """

    def place(keys: tuple[Any, ...], leaf: nnx.Variable) -> nnx.Variable:
        shape = leaf.get_value().shape
        axes = leaf.get_metadata()["axes"][-len(shape) :]
        return leaf.copy(partition_spec(axes, shape, mesh, _path(keys)))

    return jax.tree_util.tree_map_with_path(place, module, is_leaf=_is_variable)


def pinned(module: AnyModule, policy: Policy) -> AnyModule:
    """Constrains each parameter, and so its gradient, to its declared layout on the current mesh.

    Call it where a layer is taken out of its stack: the layer then stays split until it is gathered
    for its products, and its gradients are reduced to shards instead of being summed whole on every
    device.
    """

    def pin(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        axes = variable.get_metadata()["axes"]

        def gather(leaf: jax.Array) -> jax.Array:  # a small weight has two
            dtype = jnp.float32 if "router_embed" in axes else policy.travels(leaf.dtype)
            return gather_for_use(leaf, axes[len(axes) - leaf.ndim :], dtype)

        return variable.copy(jax.tree.map(gather, value))

    return jax.tree.map(pin, module, is_leaf=_is_variable)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, look_up: LookUp = stored_spec) -> Any:
    """Gives each array its NamedSharding: declared variables by their axes, others replicated.

    Args:
      tree: a model, or a pytree that holds declared variables, such as an optimizer's moments.
      look_up: `stored_spec` for what training holds, but `optimizer_spec` for the moments;
        `generation_spec` for a model that only generates.

    Raises:
      ValueError: some dimensions do not divide over the mesh; all of them are listed.
    """
    problems: list[str] = []

    def place(keys: tuple[Any, ...], leaf: Any) -> Any:
        if not _is_variable(leaf):
            return NamedSharding(mesh, PartitionSpec())
        try:
            spec = look_up(leaf.get_metadata()["axes"], leaf.get_value().shape, mesh, _path(keys))
        except ValueError as error:
            problems.append(str(error))
            return leaf
        return leaf.copy(NamedSharding(mesh, spec))

    placed = jax.tree_util.tree_map_with_path(place, tree, is_leaf=_is_variable)
    if problems:
        raise ValueError("\n".join(problems))
    return placed

"""Code that runs on each device's own shard, with its collectives written by hand.

`on_shards` is `jax.shard_map` under the current mesh. Without a mesh it is a plain call. Inside
another `shard_map`, as in a pipeline's stages, its result can be differentiated, which JAX (0.10)
does not support by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

Specs = tuple[Any, Any]  # of arguments and of results: trees of PartitionSpec or their prefixes


def on_shards(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    specs: Callable[[AbstractMesh], Specs],
    *,
    checked: bool = True,
) -> Any:
    """Calls `function` on every device of the current mesh with that device's shard of `arguments`.

    Inside `shard_map` over some axes, only the other axes are split, and the backward pass
    recomputes the function.

    Args:
      specs: returns the PartitionSpecs for a mesh; called only if there is one.
      checked: whether JAX checks which results vary over which axes; kernels may not declare it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = {name for name in mesh.axis_names if name not in mesh.manual_axes}
    if all(mesh.shape[name] == 1 for name in split):
        return function(*arguments)
    in_specs, out_specs = specs(mesh)
    shard_map = partial(jax.shard_map, axis_names=split, check_vma=checked)
    if not mesh.manual_axes:
        return shard_map(function, in_specs=in_specs, out_specs=out_specs)(*arguments)
    return _differentiated_inside(shard_map, function, arguments, in_specs, out_specs)


def _differentiated_inside(
    shard_map: Any, function: Callable[..., Any], arguments: tuple[Any, ...], in_specs, out_specs
) -> Any:
    """Makes the sharded call, with a backward pass that is a sharded call of its own."""
    leaves, tree = jax.tree.flatten(arguments)
    leaf_specs = tuple(jax.tree.leaves(jax.tree.broadcast(in_specs, arguments)))
    real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def select(kept: Sequence[bool], values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(value for value, keep in zip(values, kept, strict=True) if keep)

    def flat(*values: jax.Array) -> Any:
        return function(*jax.tree.unflatten(tree, values))

    @jax.custom_vjp
    def call(*values: jax.Array) -> Any:
        return shard_map(flat, in_specs=leaf_specs, out_specs=out_specs)(*values)

    def backward(values: tuple[jax.Array, ...], cotangent: Any) -> tuple[Any, ...]:
        wanted = [leaf.dtype != jax.dtypes.float0 for leaf in jax.tree.leaves(cotangent)]
        result_specs = jax.tree.leaves(jax.tree.broadcast(out_specs, cotangent))

        def pull(values: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]) -> Any:
            def of_real(*chosen: jax.Array) -> tuple[jax.Array, ...]:
                given = iter(chosen)
                full = [next(given) if r else v for v, r in zip(values, real, strict=True)]
                return select(wanted, jax.tree.leaves(flat(*full)))

            return jax.vjp(of_real, *select(real, values))[1](cotangents)

        gradients = iter(
            shard_map(
                pull,
                in_specs=(leaf_specs, select(wanted, result_specs)),
                out_specs=select(real, leaf_specs),
            )(values, select(wanted, jax.tree.leaves(cotangent)))
        )
        return tuple(next(gradients) if r else None for r in real)

    call.defvjp(lambda *values: (call(*values), values), backward)
    return call(*leaves)

"""Experts by slot: which replica serves a token, and how weights move to the slots of a placement.

With replicas (`dsjax.parallel.eplb`) the leading dimension of a layer's experts counts slots, each
of which holds one replica of an expert, and every device along the mesh axis `expert` has equally
many. Letters of this file: N devices along `expert`, P slots, X the most replicas of an expert; a
device has p of the slots and, before they are rearranged, e of the experts or slots.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.kernels.varying import vary_as

_AXIS = "expert"


def replicas(experts_mK: jax.Array, slots_EX: jax.Array, n_ranks: int) -> jax.Array:
    """Returns the slot that serves each choice, int32 [m, K].

    An expert's tokens take turns: the token's number, counted through all devices along `expert`,
    chooses the replica. It does not depend on other tokens, and neighbours go to different ones.

    Args:
      slots_EX: int32, the slots of each expert, then -1.
      n_ranks: devices along `expert`; runs inside `shard_map` if there are several.
    """
    m = len(experts_mK)
    first = lax.axis_index(_AXIS) * m if n_ranks > 1 else jnp.int32(0)
    token_m1 = first + jnp.arange(m, dtype=jnp.int32)[:, None]
    count_E = (slots_EX >= 0).sum(axis=1, dtype=jnp.int32)
    return slots_EX[experts_mK, token_m1 % count_E[experts_mK]]


def rearranged(w: jax.Array, source_LP: np.ndarray) -> jax.Array:
    """Returns weights [L, P, ...] whose slot p of layer l holds what w [L, .., ...] had at
    `source_LP[l, p]`, with w's layout on its mesh. With as many slots as before w's memory is used
    again, and w is gone.

    The devices exchange one slot each at a time, so that no device holds more than its own weights,
    its slots of one layer, and N slots on their way.
    """
    sharding = w.sharding
    assert isinstance(sharding, NamedSharding)
    again = source_LP.shape[1] == w.shape[1]
    return (_moved if again else _copied)(w, source_LP.astype(np.int32), sharding)


def _rearranged(w: jax.Array, source_LP: jax.Array, sharding: NamedSharding) -> jax.Array:
    n_ranks = sharding.mesh.shape[_AXIS]
    everywhere = PartitionSpec()
    return jax.shard_map(
        partial(_on_shards, n_ranks=n_ranks),
        mesh=sharding.mesh,
        in_specs=(sharding.spec, everywhere),
        out_specs=sharding.spec,
    )(w, source_LP)


_copied = jax.jit(_rearranged, static_argnums=2)
_moved = jax.jit(_rearranged, static_argnums=2, donate_argnums=0)


def _on_shards(w_LeX: jax.Array, source_LP: jax.Array, *, n_ranks: int) -> jax.Array:
    n_layers, e = w_LeX.shape[:2]
    p = source_LP.shape[1] // n_ranks
    me = lax.axis_index(_AXIS) if n_ranks > 1 else 0

    def exchange(own_eX: jax.Array, source_N: jax.Array) -> jax.Array:
        """Fills one slot of every device."""
        sent_NX = jnp.take(own_eX, source_N % e, axis=0)  # of use to those whose source is here
        if n_ranks > 1:
            # own[e, ...] -> all_to_all(expert) -> what every device has for this one
            sent_NX = lax.all_to_all(sent_NX, _AXIS, 0, 0, tiled=True)
        return lax.dynamic_index_in_dim(sent_NX, source_N[me] // e, keepdims=False)

    def layer(index: jax.Array, into_LpX: jax.Array) -> jax.Array:
        source_P = source_LP[index]
        from_LeX = into_LpX if p == e else w_LeX
        own_eX = lax.dynamic_index_in_dim(from_LeX, index, keepdims=False)

        def fill() -> jax.Array:
            return lax.map(partial(exchange, own_eX), source_P.reshape(n_ranks, p).T)

        if p != e:
            return lax.dynamic_update_index_in_dim(into_LpX, fill(), index, 0)
        stays = (source_P == jnp.arange(p * n_ranks, dtype=jnp.int32)).all()
        own_eX = lax.cond(stays, lambda: own_eX, fill)
        return lax.dynamic_update_index_in_dim(into_LpX, own_eX, index, 0)

    start_LpX = w_LeX
    if p != e:
        start_LpX = jnp.zeros((n_layers, p, *w_LeX.shape[2:]), w_LeX.dtype)
        start_LpX = vary_as(start_LpX, w_LeX)
    return lax.fori_loop(0, n_layers, layer, start_LpX)

"""Which replica serves a token, and how weights move to their slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.parallel.expert_slots import rearranged, replicas
from dsjax.parallel.mesh import make_mesh

SLOTS = jnp.asarray([[0, -1, -1], [1, 4, 5], [3, 2, -1]], jnp.int32)  # 1, 3 and 2 replicas


def test_tokens_of_an_expert_take_turns_among_its_replicas():
    experts = jnp.asarray([[1, 0], [1, 2], [2, 1], [1, 2], [0, 1]], jnp.int32)
    found = replicas(experts, SLOTS, n_ranks=1)
    assert found.tolist() == [[1, 0], [4, 2], [3, 5], [1, 2], [0, 4]]


def test_turns_go_on_from_device_to_device():
    mesh = make_mesh({"expert": 4}, n_devices=4)
    experts = jnp.full((4, 1), 1, jnp.int32)  # one token on each device, as in decoding
    spread = jax.shard_map(
        lambda experts, slots: replicas(experts, slots, n_ranks=4),
        mesh=mesh, in_specs=(PartitionSpec("expert"), PartitionSpec()),
        out_specs=PartitionSpec("expert"),
    )  # fmt: skip
    assert spread(experts, SLOTS)[:, 0].tolist() == [1, 4, 5, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize(
    ("sizes", "spec"),
    [({"expert": 4}, (None, "expert")),
     ({"data": 2, "expert": 2, "tensor": 2}, (None, "expert", None, "tensor")),
     ({"fsdp": 2, "expert": 2}, (None, ("expert",), ("fsdp",)))],
    ids=str,
)  # fmt: skip
def test_slots_hold_what_their_source_had(sizes, spec, dtype):
    rng = np.random.default_rng(0)
    mesh = make_mesh(sizes, n_devices=int(np.prod(list(sizes.values()))))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    w = rng.integers(-8, 8, (3, 8, 4, 2)).astype(jnp.dtype(dtype))
    source = rng.integers(0, 8, (3, 12))
    more = rearranged(jax.device_put(w, sharding), source)
    wanted = np.stack([layer[chosen] for layer, chosen in zip(w, source, strict=True)])
    np.testing.assert_array_equal(more, wanted)
    assert more.sharding.is_equivalent_to(sharding, 4)
    again = rng.integers(0, 12, (3, 12))
    again[1] = np.arange(12)  # a layer that stays
    before = more
    moved = rearranged(more, again)
    wanted = np.stack([layer[chosen] for layer, chosen in zip(wanted, again, strict=True)])
    np.testing.assert_array_equal(moved, wanted)
    assert before.is_deleted() and moved.sharding.is_equivalent_to(sharding, 4)

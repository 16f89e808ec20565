"""One of two processes that save, find damage and restore together; `test_store` starts both.

python -m tests.checkpoint.two_processes INDEX PORT FOLDER
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.checkpoint import manifest, store
from dsjax.parallel.mesh import make_mesh
from tests.checkpoint.damage import flip


def main(index: int, port: str, folder: Path) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh = make_mesh({"data": 2, "fsdp": 2})
    values = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)

    def put(*spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])

    state = {"copied": put("fsdp"), "split": put(("data", "fsdp")), "whole": put()}
    assert store.newest_whole(folder, set_aside=True, say=print) is None
    checkpoints = store.Store(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state, {"step": step})
    checkpoints.close()
    multihost_utils.sync_global_devices("saved")
    if index == 0:
        assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
        leaves = manifest.verify(folder / "3").leaves.values()
        assert len({leaf["fingerprint"] for leaf in leaves}) == 1
        flip(next((folder / "3" / "state").rglob("d/*")), 100)
    multihost_utils.sync_global_devices("damaged")
    said: list[str] = []
    assert store.newest_whole(folder, set_aside=True, say=said.append) == 2
    assert "is damaged" in said[0] and "using step 2" in said[0]
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    for leaf in store.restore(folder, 2, like).values():
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index])
    multihost_utils.sync_global_devices("restored")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))

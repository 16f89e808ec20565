"""Checkpoints: exact, atomic, the newest few kept, and clear about what does not fit."""

import resource
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsjax.checkpoint import store
from dsjax.config import OptimConfig
from dsjax.train.optimizer import adamw
from tests.checkpoint import kill_saves
from tests.checkpoint.damage import flip
from tests.checkpoint.kill_points import ROOT


def make_state(seed: int = 0):
    rng = np.random.default_rng(seed)
    params = nnx.State(
        {
            "embed": {
                "weight": nnx.Param(
                    jnp.asarray(rng.normal(size=(16, 8)), jnp.float32), axes=("vocab", "embed")
                )
            },
            "norm": {
                "weight": nnx.Param(jnp.asarray(rng.normal(size=8), jnp.float32), axes=("embed",))
            },
        }
    )
    return {"params": params, "optimizer": adamw(OptimConfig(moment_dtype="bfloat16")).init(params)}


def abstract(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_identical(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert left.dtype == right.dtype and left.sharding == right.sharding
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint of step 4, and its state."""
    directory, state = tmp_path_factory.mktemp("saved"), make_state()
    checkpoints = store.Store(directory, keep=2)
    checkpoints.save(4, state, {"step": 4, "progress": 0.1, "data": {"rows": [1, 2]}, "note": None})
    checkpoints.close()
    return directory, state


def test_store_restores_bitwise(saved):
    directory, state = saved
    assert store.latest(directory) == 4
    assert_identical(store.restore(directory, 4, abstract(state)), state)
    assert store.read_record(directory, 4) == {
        "step": 4,
        "progress": 0.1,
        "data": {"rows": [1, 2]},
        "note": None,
    }


def test_store_saves_values_of_the_moment_although_buffers_are_donated(tmp_path):
    """The step donates the state it is given, so what is saved asynchronously must be a copy."""
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = {"weight": jnp.zeros((512, 512)), "count": jnp.int32(0)}
    checkpoints = store.Store(tmp_path, keep=2)
    for number in range(1, 5):
        state = step(state)
        checkpoints.save(number, state, {"step": number})
    state = step(state)
    checkpoints.close()
    assert store.steps(tmp_path) == [3, 4]
    for number in (3, 4):
        restored = store.restore(tmp_path, number, abstract(state))
        np.testing.assert_array_equal(restored["weight"], np.full((512, 512), number))
        assert restored["count"] == number


def test_store_restores_to_another_sharding(saved):
    directory, state = saved
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def placed(leaf):
        spec = PartitionSpec("fsdp") if leaf.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    restored = store.restore(directory, 4, jax.tree.map(placed, state))
    weight = restored["params"]["embed"]["weight"].get_value()
    assert weight.sharding == NamedSharding(mesh, PartitionSpec("fsdp"))
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_store_lists_every_array_that_does_not_fit(saved):
    directory, state = saved
    wrong = abstract(state)
    wrong["params"]["embed"]["weight"].set_value(jax.ShapeDtypeStruct((16, 9), jnp.float32))
    wrong["params"]["head"] = wrong["params"].pop("norm")
    with pytest.raises(ValueError, match="does not fit this config in 3 arrays") as error:
        store.restore(directory, 4, wrong)
    assert "missing params.head.weight float32[8]" in str(error.value)
    assert "extra params.norm.weight float32[8]" in str(error.value)
    assert "params.embed.weight is float32[16, 8], wanted float32[16, 9]" in str(error.value)


def test_store_passes_over_what_is_damaged_and_keeps_it_aside(saved, tmp_path):
    """An empty folder, a copy that lost a file, and a flipped bit: all newer than a whole one."""
    directory, state = saved
    for step in ("4", "8", "10"):
        shutil.copytree(directory / "4", tmp_path / step)
    (tmp_path / "8" / "state" / "commit_success.txt").unlink()
    (tmp_path / "9").mkdir()
    flip(tmp_path / "10" / "state" / "manifest.ocdbt", 100)
    said: list[str] = []
    assert store.newest_whole(tmp_path, say=said.append) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "4", "8", "9"]
    assert "The checkpoint of step 8 is not used; using step 4" in said[2]
    said.clear()
    assert store.newest_whole(tmp_path, set_aside=True, say=said.append) == 4
    assert [line.partition(" ")[0].removeprefix(f"{tmp_path}/") for line in said] == [
        "10/state/manifest.ocdbt",
        "9/manifest.json",
        "8/state/commit_success.txt",
    ]
    assert "step 8 is not used (it is now 8.damaged); using step 4" in said[2]
    checkpoints = store.Store(tmp_path, keep=2)
    checkpoints.save(8, state, {"step": 8})
    checkpoints.close()
    assert store.steps(tmp_path) == [4, 8] and (tmp_path / "8.damaged").is_dir()


def test_store_begins_nothing_anew_over_what_is_damaged(saved, tmp_path):
    assert store.newest_whole(tmp_path, say=print) is None
    shutil.copytree(saved[0] / "4", tmp_path / "4")
    (tmp_path / "4" / "state" / "_METADATA").write_text("")
    for _ in range(2):  # the same command again finds it no other way
        with pytest.raises(ValueError, match=r"is damaged.*_METADATA has 0 bytes.*Restore one"):
            store.newest_whole(tmp_path, set_aside=True, say=print)


def test_store_refuses_a_checkpoint_that_lies_under_another_name(saved, tmp_path):
    """Whole in itself, but of another step."""
    shutil.copytree(saved[0] / "4", tmp_path / "6")
    with pytest.raises(ValueError, match="6 contains the checkpoint of step 4"):
        store.newest_whole(tmp_path, say=print)


def test_store_removes_what_interrupted_saves_left(tmp_path):
    for name in ("3.partial", "2.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    store.Store(tmp_path, keep=1).close()
    assert list(tmp_path.iterdir()) == []


def test_store_checks_the_values_that_come_back(saved, monkeypatch):
    """Right files, and a bit that flips after they were read."""
    directory, state = saved
    plain = store._lookup

    def flipped(tree, name):
        leaf = plain(tree, name)
        return leaf.at[0].set(-leaf[0]) if name == ("params", "norm", "weight") else leaf

    monkeypatch.setattr(store, "_lookup", flipped)
    with pytest.raises(store.Damage, match=r"4: params\.norm\.weight came back with other values"):
        store.restore(directory, 4, abstract(state))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_store_writes_no_state_that_is_not_finite(tmp_path, value):
    state = make_state()
    state["params"]["norm"]["weight"].set_value(jnp.full(8, value, jnp.float32))
    checkpoints = store.Store(tmp_path, keep=1)
    with pytest.raises(ValueError, match=r"step 3 .*NaN or infinity in params\.norm\.weight"):
        checkpoints.save(3, state, {})
    checkpoints.close()
    assert list(tmp_path.iterdir()) == []


def test_store_reports_a_full_disk(tmp_path):
    """A file size limit makes the kernel refuse to write, as a full disk does."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    checkpoints = store.Store(tmp_path / "run", keep=2)
    big = {"weight": jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)), jnp.float32)}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match=r"checkpoint.*run.*free space there or make it writable"):
            checkpoints.save(1, big, {"step": 1})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.latest(tmp_path / "run") is None


def test_store_reports_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot open the checkpoint folder .*file/checkpoints"):
        store.Store(tmp_path / "file" / "checkpoints", keep=1)


def test_store_cuts_a_large_array_into_matrices(tmp_path, monkeypatch):
    """So that one layer's, or one expert's, can be read without the rest."""
    monkeypatch.setattr(store, "CHUNK_BYTES", 4096)
    state = {
        "large": jnp.zeros((2, 3, 32, 32)),
        "matrix": jnp.zeros((64, 32)),
        "small": jnp.ones(8),
    }
    checkpoints = store.Store(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.close()
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(tmp_path / "1" / "state").item_metadata.tree
    chunks = {name: leaf.storage.chunk_shape for name, leaf in tree.items()}
    assert chunks == {"large": (1, 1, 32, 32), "matrix": (32, 32), "small": (8,)}
    restored = store.restore(tmp_path, 1, abstract(state))
    assert_identical(restored, state)


def assert_survived(results):
    """Each run was taken up again where it had to be, and ended as if nothing had been."""
    undisturbed, *killed = results
    assert undisturbed["left"] == ["3", "4"]
    for result in killed:
        assert result["final"] == undisturbed["final"], result
        assert result["left"] == undisturbed["left"], result
        assert result["resumed"] >= result["acknowledged"], result


# Before Orbax's folder of the arrays, before its name, before the manifest's name, before the
# checkpoint's name, in the middle of removing an old one.
NAMED_POINTS = ["mkdir 5", "rename 1", "replace 2", "rename 4", "unlink 5"]


@pytest.mark.heavy
def test_killed_save_leaves_a_run_that_goes_on_to_the_same_bits(tmp_path):
    results = kill_saves.kill(tmp_path / "runs", "sync", NAMED_POINTS)
    assert [result["killed"] for result in results[1:]] == [True] * len(NAMED_POINTS)
    assert_survived(results)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_save_killed_at_any_act_or_moment_leaves_a_run_that_goes_on(tmp_path, mode):
    """Every fifth act on the disk of all kinds, and a hundred random moments."""
    acts = kill_saves.kill(tmp_path / "counted", mode, [])[0]["acts"]
    points = [f"{name} {number}" for name in acts for number in range(1, acts[name] + 1, 5)]
    points += kill_saves.moments(100, seed=5)
    results = kill_saves.kill(tmp_path / "runs", mode, points)
    assert sum(result["killed"] for result in results[1:]) > 100
    assert_survived(results)


@pytest.mark.slow
def test_two_processes_save_and_verify_together(tmp_path):
    """Each hashes its share; damage that one of them finds is damage to both."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "tests.checkpoint.two_processes"]
    both = [
        subprocess.Popen([*command, str(index), str(port), str(tmp_path / "run")], cwd=ROOT)
        for index in range(2)
    ]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    assert (tmp_path / "run" / "3.damaged").is_dir()

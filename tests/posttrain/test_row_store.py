"""Rows are appended in order, survive a killed job, and belong to what they were made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.row_store import Field, RowStore, weights_digest

FIELDS = {"ids": Field((3, 2), "int32"), "logp": Field((), "float32")}


def store(folder, **identity):
    return RowStore(folder / "kept", 5, FIELDS, {"teacher": "t", **identity})


def values(first, count):
    numbers = np.arange(first, first + count)
    return {
        "ids": np.broadcast_to(numbers[:, None, None], (count, 3, 2)).astype(np.int32),
        "logp": (numbers / 7).astype(np.float32),
    }


def check(kept):
    assert kept.complete
    for name, array in kept.read().items():
        np.testing.assert_array_equal(array, values(0, 5)[name])
        np.testing.assert_array_equal(np.load(kept.folder / f"{name}.npy"), array)


def test_rows_come_back(tmp_path):
    kept = store(tmp_path)
    assert kept.done == 0 and not kept.folder.exists()
    kept.append(values(0, 2))
    assert kept.done == 2 and not kept.complete
    store(tmp_path).append(values(2, 3))
    check(store(tmp_path))


@pytest.mark.parametrize("cut", [1, 10, 30])
@pytest.mark.parametrize("name", ["ids", "logp"])
def test_a_job_killed_in_a_write_goes_on_after_the_last_whole_row(name, cut, tmp_path):
    kept = store(tmp_path)
    kept.append(values(0, 4))
    path = kept.folder / f"{name}.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-cut] if name == "ids" else data[: -min(cut, 3)])
    done = kept.done
    assert done < 4
    kept.append(values(done, 5 - done))
    check(kept)


def test_a_job_killed_before_its_first_row_begins_again(tmp_path):
    kept = store(tmp_path)
    kept.append(values(0, 1))
    for name in FIELDS:
        path = kept.folder / f"{name}.npy"
        path.write_bytes(path.read_bytes()[:40])
    assert kept.done == 0
    kept.append(values(0, 5))
    check(kept)


def test_rows_of_something_else_are_refused(tmp_path):
    store(tmp_path).append(values(0, 1))
    with pytest.raises(ValueError, match=r"made of something else: teacher was 't' and is now 'u'"):
        store(tmp_path, teacher="u").claim(begun=True)
    with pytest.raises(ValueError, match=r"rows was 5 and is now 6.*use another --workdir"):
        RowStore(tmp_path / "kept", 6, FIELDS, {"teacher": "t"}).claim(begun=True)
    for known in ("t", None):
        store(tmp_path, teacher=known).claim(begun=True)
        assert store(tmp_path).done == 1


def test_rows_of_something_else_make_way_before_a_run_has_begun(tmp_path):
    store(tmp_path).append(values(0, 1))
    store(tmp_path).claim(begun=False)
    assert store(tmp_path).done == 1
    other = RowStore(tmp_path / "kept", 5, FIELDS, {"teacher": "u"})
    other.claim(begun=False)
    assert other.done == 0
    other.append(values(0, 5))
    check(other)


def test_weights_are_told_apart_but_not_by_where_they_lie():
    mesh = make_mesh({"data": 8})
    weights = {"w": np.arange(16, dtype=np.float32)}
    spread = jax.device_put(weights, NamedSharding(mesh, PartitionSpec("data")))
    here = jax.tree.map(jnp.asarray, weights)
    assert weights_digest(spread) == weights_digest(here)
    assert weights_digest({"w": here["w"].at[3].add(1e-6)}) != weights_digest(here)

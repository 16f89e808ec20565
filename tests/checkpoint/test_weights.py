"""Converted weights on disk: exact, readable by Orbax as well, and never taken for whole before
they are."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsjax.checkpoint import store, weights
from dsjax.checkpoint.names import Tensor
from dsjax.checkpoint.slices import Leaf
from dsjax.checkpoint.weights import Weights, WeightsWriter, leaf_name, scales_name
from tests.checkpoint.conversions import read
from tests.closeness import EXACT, assert_close

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = (4, 3)

EMBED, HEAD, NORM = ("params", "embed", "weight"), ("params", "head"), ("params", "norm", "weight")
EXPERTS, BIAS = ("params", "moe", "w_up"), ("router", "moe", "bias")
LEAVES = {
    EMBED: Leaf((20, 8), BFLOAT16, 0, False),
    HEAD: Leaf((8, 20), BFLOAT16, 0, True),
    NORM: Leaf((2, 8), FLOAT32, 1, False),
    EXPERTS: Leaf((2, 4, 12, 8), E4M3, 2, True),
    scales_name(EXPERTS): Leaf((2, 4, 4, 2), FLOAT32, 2, True),
    BIAS: Leaf((2, 4), FLOAT32, 1, False),
}


def slots(leaf: Leaf):
    return itertools.product(*map(range, leaf.shape[: leaf.slot_rank]))


def tensor(name: tuple[str, ...], slot: tuple[int, ...]) -> np.ndarray:
    """A slot's tensor as published: any bits that are not NaN."""
    leaf = LEAVES[name]
    rng = np.random.default_rng([len(str(name)), *slot])
    return rng.normal(size=leaf.tensor_shape).astype(leaf.dtype)


def array(name: tuple[str, ...]) -> np.ndarray:
    """The whole leaf, in our orientation."""
    leaf = LEAVES[name]
    whole = np.empty(leaf.shape, leaf.dtype)
    for slot in slots(leaf):
        whole[slot] = tensor(name, slot).T if leaf.transpose else tensor(name, slot)
    return whole


def write(folder: Path, leaves: dict = LEAVES, *, finish: bool = True) -> WeightsWriter:
    writer = WeightsWriter(folder, leaves, BLOCK)
    for name, leaf in leaves.items():
        for slot in slots(leaf):
            writer.write(name, slot, tensor(name, slot))
    if finish:
        writer.finish()
    return writer


def everything(name: tuple[str, ...]) -> tuple[slice, ...]:
    return (slice(None),) * len(LEAVES[name].shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The leaves above, the largest of them in several chunks of which the last is padded."""
    path = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK_BYTES", 128)
        write(path)
    return path


@pytest.mark.parametrize("name", [EMBED, HEAD, NORM, BIAS], ids=".".join)
def test_weights_read_back_bitwise(folder, name):
    opened = Weights(folder)
    assert opened.leaves[name] == LEAVES[name]
    assert_close(read(opened, name, everything(name)), array(name), EXACT)
    index = (slice(1, 2), slice(3, 8))
    assert_close(read(opened, name, index), array(name)[index], EXACT)


@pytest.mark.parametrize("name", list(LEAVES), ids=".".join)
def test_weights_give_each_tensor_back_as_published(folder, name):
    opened = Weights(folder)
    for slot in slots(LEAVES[name]):
        got = opened.read_published(name, slot, LEAVES[name].transpose)
        assert got.flags.c_contiguous
        assert_close(got, tensor(name, slot), EXACT)


def test_weights_chunk_holds_the_published_bytes(folder):
    path = folder / ".".join(EXPERTS) / "1.2.0.0"
    assert path.read_bytes() == tensor(EXPERTS, (1, 2)).tobytes()
    pieces = [(folder / ".".join(HEAD) / f"0.{piece}").read_bytes() for piece in range(3)]
    assert [len(piece) for piece in pieces] == [112] * 3
    assert b"".join(pieces) == tensor(HEAD, ()).tobytes() + bytes(16)


def test_weights_dequantize_fp8_with_the_scales_of_each_block(folder):
    values, scales = array(EXPERTS).astype(FLOAT32), array(scales_name(EXPERTS))
    want = values * np.repeat(np.repeat(scales, 3, axis=2), 4, axis=3)[:, :, :12, :8]
    opened = Weights(folder)
    assert_close(read(opened, EXPERTS, everything(EXPERTS)), want, EXACT)
    index = (1, slice(1, 3), slice(2, 10), slice(3, 7))
    assert_close(read(opened, EXPERTS, index), want[index], EXACT)
    assert_close(read(opened, EXPERTS, index, BFLOAT16), want[index].astype(BFLOAT16), EXACT)


def test_weights_read_only_the_rows_of_a_slice(folder, monkeypatch):
    reads, rows = [], weights._Chunks.rows

    def counted(self, slot, start, stop):
        reads.append((self.leaf.shape, slot, start, stop))
        return rows(self, slot, start, stop)

    monkeypatch.setattr(weights._Chunks, "rows", counted)
    read(Weights(folder), HEAD, (slice(None), slice(5, 10)))
    assert reads == [((8, 20), (), 5, 10)]


def test_weights_are_restored_by_orbax(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder)
    for name in LEAVES:
        leaf = restored
        for key in name:
            leaf = leaf[key]
        assert isinstance(leaf, np.ndarray)  # of no device, which another machine may not have
        assert_close(leaf, array(name), EXACT, ".".join(name))


def test_weights_are_restored_by_orbax_onto_a_mesh(folder):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    abstract: dict = {}
    for name, leaf in LEAVES.items():
        node = abstract
        for key in name[:-1]:
            node = node.setdefault(key, {})
        split = [axis for axis, size in enumerate(leaf.shape) if size % 4 == 0][-1]
        placed = NamedSharding(mesh, PartitionSpec(*[None] * split, "x"))
        node[name[-1]] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder, abstract)
    for name, leaf in LEAVES.items():
        got = restored
        for key in name:
            got = got[key]
        assert got.addressable_shards[0].data.size * 4 == array(name).size
        assert_close(got, array(name), EXACT, ".".join(name))
        assert leaf.dtype == got.dtype


def test_weights_without_metadata_are_refused(tmp_path):
    write(tmp_path, finish=False)
    with pytest.raises(ValueError, match=r"not a complete checkpoint: it has no _METADATA.*again"):
        Weights(tmp_path)


def test_weights_that_are_written_again_are_not_whole_meanwhile(tmp_path):
    write(tmp_path)
    again = WeightsWriter(tmp_path, LEAVES, BLOCK)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        Weights(tmp_path)
    again.finish()  # the chunks are still there
    assert_close(read(Weights(tmp_path), NORM, everything(NORM)), array(NORM), EXACT)


def test_weights_finish_only_when_every_slot_is_written(tmp_path):
    writer = WeightsWriter(tmp_path, {NORM: LEAVES[NORM]})
    writer.write(NORM, (0,), tensor(NORM, (0,)))
    with pytest.raises(ValueError, match=r"lacks 1 of its chunks, the first being .*weight/1\.0"):
        writer.finish()
    (tmp_path / ".".join(NORM) / "1.0").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="lacks 1 of its chunks"):
        writer.finish()
    assert not (tmp_path / "_METADATA").exists()


def test_weights_writer_goes_on_only_with_the_same_arrays(tmp_path):
    write(tmp_path, finish=False)
    changed = LEAVES | {NORM: Leaf((2, 9), FLOAT32, 1, False)}
    with pytest.raises(ValueError, match=r"started for an array of another shape or dtype; delete"):
        WeightsWriter(tmp_path, changed, BLOCK)


def test_weights_writer_reports_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / ".".join(NORM)).write_text("")
    with pytest.raises(OSError, match=r"norm\.weight cannot be written"):
        WeightsWriter(tmp_path, {NORM: LEAVES[NORM]})


def test_weights_refuse_a_chunk_that_is_cut_short_or_missing(tmp_path):
    write(tmp_path)
    path = tmp_path / ".".join(NORM) / "1.0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"norm\.weight/1\.0 ends before its tensor does"):
        read(Weights(tmp_path), NORM, everything(NORM))
    path.unlink()
    with pytest.raises(ValueError, match=r"norm\.weight/1\.0 does not exist"):
        read(Weights(tmp_path), NORM, everything(NORM))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("tree_metadata"), "is damaged.*KeyError.*tree_metadata"),
        (lambda values: values["custom_metadata"]["slot_ranks"].pop("params.head"), "is damaged"),
        (lambda values: values["custom_metadata"].update(scale_block=3), "is damaged"),
        (
            lambda values: values["tree_metadata"][str(HEAD)]["key_metadata"][0].update(key="../x"),
            r"is damaged.*array name \('\.\./x', 'head'\)",
        ),
    ],
    ids=["tree", "slot ranks", "block", "name"],
)
def test_weights_refuse_a_damaged_description(tmp_path, change, message):
    write(tmp_path)
    values = json.loads((tmp_path / "_METADATA").read_text())
    change(values)
    (tmp_path / "_METADATA").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        Weights(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"compressor": {"id": "zstd", "level": 1}}, {"chunks": [2, 8]}, {"dimension_separator": "/"}],
    ids=lambda change: next(iter(change)),
)
def test_weights_refuse_an_array_that_is_laid_out_otherwise(tmp_path, change):
    write(tmp_path)
    path = tmp_path / ".".join(NORM) / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"\.zarray does not describe whole tensors"):
        Weights(tmp_path)


@pytest.fixture(scope="module")
def run_state(tmp_path_factory):
    """The state of a run's checkpoint, one array in one chunk and one in several."""
    rng = np.random.default_rng(0)
    shapes = {"w_up": (2, 4, 24, 16), "embed": (64, 16), "norm": (2, 16)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 2048)
        checkpoints = store.Store(directory, keep=1)
        checkpoints.save(1, {"params": jax.tree.map(jnp.asarray, params)}, {})
        checkpoints.close()
    return directory / "1" / "state", params


def test_weights_read_a_run(run_state):
    folder, params = run_state
    opened = Weights(folder)
    assert {name[1]: leaf.shape for name, leaf in opened.leaves.items()} == {
        name: value.shape for name, value in params.items()
    }
    index = (1, slice(1, 4), slice(3, 20), slice(5, 9))
    assert_close(read(opened, ("params", "w_up"), index), params["w_up"][index], EXACT)
    whole = (slice(None), slice(None))
    got = read(opened, ("params", "embed"), whole, BFLOAT16)
    assert_close(got, params["embed"].astype(BFLOAT16), EXACT)
    for slot in ((0, 1), (1, 3)):
        got = opened.read_published(("params", "w_up"), slot, True)
        assert got.flags.c_contiguous
        assert_close(got, params["w_up"][slot].T, EXACT)
    assert_close(opened.read_published(("params", "norm"), (1,), False), params["norm"][1], EXACT)


def test_weights_of_a_run_that_lost_its_arrays_are_refused(run_state, tmp_path):
    (tmp_path / "_METADATA").write_bytes((run_state[0] / "_METADATA").read_bytes())
    with pytest.raises(ValueError, match=r"is damaged: .*; copy the checkpoint again"):
        Weights(tmp_path)


def test_leaf_names_are_those_of_a_run():
    gate = Tensor("w", ("moe_layers", "gate", "weight"), (0,), (4, 8), True)
    bias = Tensor("b", ("moe_layers", "gate", "bias"), (0,), (4,), False, trains=False)
    assert leaf_name(gate) == ("params", "moe_layers", "gate", "weight")
    assert leaf_name(bias) == ("router", "moe_layers", "gate", "bias")

"""The manifest: any bit that flips in any file is noticed, and the file named."""

import hashlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import manifest, store
from dsjax.checkpoint.load import open_checkpoint
from dsjax.checkpoint.manifest import Damage, File, Guard, Manifest
from tests.checkpoint.conversions import bring_in, read
from tests.checkpoint.damage import flip
from tests.checkpoint.hf_files import plain, write
from tests.golden.cases import CASES

RECORD = {"step": 3, "data": {"next_row": 7}, "versions": {"nproc": 2}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a run, with files of every class that there is."""
    directory = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    shapes = {"embed": (64, 32), "norm": (32,), "experts": (2, 4, 16, 16)}
    state = {
        group: {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
        for group, dtype in (("params", jnp.float32), ("optimizer", jnp.bfloat16))
    }
    checkpoints = store.Store(directory, keep=1)
    checkpoints.save(3, state, RECORD)
    checkpoints.close()
    return directory / "3"


def classes(folder):
    """Every file of a checkpoint, by what it is for."""
    found = {}
    for name in [manifest.NAME, *manifest.listing(folder)]:
        found.setdefault("state/d" if "/d/" in name else name, []).append(folder / name)
    return found


def flips_noticed(folder, count, seed):
    """Flips bits, one at a time, over the classes of files; counts those whose file is named.

    Half of them go to the arrays, where Orbax itself notices none.
    """
    rng = np.random.default_rng(seed)
    groups = classes(folder)
    noticed = 0
    for number in range(count):
        kind = "state/d" if number % 2 else list(groups)[number // 2 % len(groups)]
        path = rng.choice(groups[kind])
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        try:
            manifest.verify(folder)
        except Damage as error:
            noticed += str(path) in str(error)
        flip(path, bit)
    manifest.verify(folder)
    return noticed


def test_any_flipped_bit_is_noticed_and_its_file_named(checkpoint):
    assert len(classes(checkpoint)) == 9
    assert flips_noticed(checkpoint, 40, seed=0) == 40


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_noticed(checkpoint):
    assert flips_noticed(checkpoint, 1000, seed=1) == 1000


def test_manifest_says_what_was_saved(checkpoint):
    found = manifest.verify(checkpoint)
    assert found.record == RECORD
    assert found.leaves["params.experts"]["shape"] == [2, 4, 16, 16]
    assert found.leaves["optimizer.norm"]["dtype"] == "bfloat16"
    assert all(len(leaf["fingerprint"]) == 16 for leaf in found.leaves.values())
    values = json.loads((checkpoint / "manifest.json").read_text())
    assert values["files"]["state/_METADATA"]["size"] == (
        (checkpoint / "state" / "_METADATA").stat().st_size
    )


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), r"_METADATA is missing"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            r"_METADATA has [0-9,]+ bytes, but was",
        ),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), r"_METADATA is damaged"),
        (lambda path: (path.unlink(), path.mkdir()), r"_METADATA (has|cannot be read)"),
    ],
    ids=["deleted", "cut short", "zeroed", "a folder"],
)
def test_other_damage_is_noticed(checkpoint, tmp_path, harm, message):
    folder = shutil.copytree(checkpoint, tmp_path / "3")
    harm(folder / "state" / "_METADATA")
    with pytest.raises(Damage, match=message):
        manifest.verify(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "manifest.json is missing. It is written last"),
        ("", "SHA-256"),
        ('{"sha256": 1}', "SHA-256"),
        ("{}\n", "SHA-256"),
    ],
)
def test_folder_without_a_manifest_of_its_own_is_refused(checkpoint, tmp_path, text, message):
    folder = shutil.copytree(checkpoint, tmp_path / "3")
    (folder / manifest.NAME).unlink()
    if text is not None:
        (folder / manifest.NAME).write_text(text)
    with pytest.raises(Damage, match=message):
        manifest.verify(folder)


def test_manifest_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    manifest.write(tmp_path, Manifest({}, {}, {}))
    monkeypatch.undo()
    with pytest.raises(Damage, match="format 2, and this version of dsjax reads 1"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"size": 1', '"sighs": 1', "sighs"),
        ('"a"', '"../a"', r"it names '\.\./a'"),
        ('"a"', '"/etc/passwd"', "it names '/etc/passwd'"),
        ('"record": {}', '"record": []', "its record is none"),
    ],
)
def test_manifest_with_other_content_than_it_should_is_refused(tmp_path, old, new, message):
    manifest.write(tmp_path, Manifest({}, {}, {"a": File(1, "0")}))
    text = (tmp_path / manifest.NAME).read_text().replace(old, new)
    rest = text.partition("\n")[2].encode()
    first = f'{{"sha256": "{hashlib.sha256(rest).hexdigest()}",\n'
    (tmp_path / manifest.NAME).write_bytes(first.encode() + rest)
    with pytest.raises(Damage, match=rf"manifest\.json is damaged: .*{message}"):
        manifest.read(tmp_path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    case = CASES["v3"]
    bring_in(write(root / "hf", case.config, plain(case)), root / "ours")
    return root / "ours"


def test_conversion_notices_any_flipped_bit_before_it_is_used(converted, tmp_path):
    """Small files when it is opened, a chunk of an array when something of it is read."""
    folder = shutil.copytree(converted, tmp_path / "copy")
    rng = np.random.default_rng(3)
    files = [manifest.NAME, *manifest.listing(folder)]
    kinds = {"".join(c for c in name.rpartition("/")[2] if not c.isdigit()): name for name in files}
    chunk = "weights/params.moe_layers.ffn.experts.w_up/0.3.0.0"
    assert chunk in files and len(kinds) > 6
    for name in [*kinds.values(), chunk]:
        bit = int(rng.integers(8 * (folder / name).stat().st_size))
        flip(folder / name, bit)
        with pytest.raises(Damage, match=f"{folder / name} is damaged"):
            opened = open_checkpoint(folder)
            for leaf in opened.weights.leaves:
                index = [slice(None)] * len(opened.weights.leaves[leaf].shape)
                read(opened.weights, leaf, index)
        flip(folder / name, bit)
    flip(folder / chunk, 9)
    opened = open_checkpoint(folder)
    whole = (slice(None), slice(None))
    assert opened.read(("moe_layers", "ffn", "experts", "w_up"), (0, 2, *whole)).size
    with pytest.raises(Damage, match=r"w_up/0\.3\.0\.0 is damaged"):
        opened.read(("moe_layers", "ffn", "experts", "w_up"), (0, 3, *whole))


def test_guard_hashes_a_file_once(converted, monkeypatch):
    hashed = []
    plainly = manifest._hash
    monkeypatch.setattr(manifest, "_hash", lambda path: hashed.append(path) or plainly(path))
    guard = Guard(converted, later=lambda name: name != "config.json")
    assert hashed == [converted / "config.json"]
    path = converted / "weights" / "_METADATA"
    guard.check(path)
    guard.check(path)
    assert hashed[1:] == [path]
    (converted / "stranger").write_text("")
    with pytest.raises(Damage, match="stranger is not one of the files that were written"):
        guard.check(converted / "stranger")
    (converted / "stranger").unlink()

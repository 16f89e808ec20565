"""Kept documents, their split and the samples."""

import numpy as np
import pytest

from dsjax.curate import deciding, reading, sampling, shards, writing


def write(
    tmp_path, count=40, *, verdicts=None, copies=None, text="text {:05}", file="p", **options
):
    schemas = {"documents": reading.SCHEMA, "verdicts": deciding.SCHEMA}
    paths = {name: tmp_path / name / "00003-0000.parquet" for name in schemas}
    for name, path in paths.items():
        path.parent.mkdir()
        with shards.Writer(path, schemas[name]) as writer:
            for number in range(count):
                row = {
                    "id": f"s/{number}",
                    "source": "s",
                    "path": file,
                    "text": text.format(number),
                }
                row["verdict"] = (verdicts or {}).get(number, "")
                writer.add({key: row[key] for key in schemas[name].names})
    (tmp_path / "out").mkdir()
    options = {"heldout_fraction": 0.25, "samples": 3, "seed": 0} | options
    options = {
        "duplicates": None,
        "start": 7,
        "passages": 0,
        "personal": True,
        "rename": 0,
    } | options
    if copies is not None:
        options["duplicates"] = tmp_path / "verdicts.npy"
        np.save(options["duplicates"], np.array([0] * 7 + copies, np.int8))
    found = writing.write(writing.Job(**paths, **options), tmp_path / "out", 3)
    sides = {
        side: [row["id"] for path in tmp_path.glob(f"out/{side}-*") for row in shards.rows(path)]
        for side in writing.SIDES
    }
    return found, sides


def test_removed_documents_are_counted_and_not_written(tmp_path):
    found, sides = write(tmp_path, verdicts={1: "words", 2: "words", 3: "language"})
    assert found["counts"] == {"s": {"kept": [37, 370], "words": [2, 20], "language": [1, 10]}}
    assert found["sides"] == {"s": {side: [len(ids), 10 * len(ids)] for side, ids in sides.items()}}
    written = sides["train"] + sides["heldout"]
    assert len(written) == len(set(written)) == 37
    assert not {"s/1", "s/2", "s/3"} & set(written)


def test_duplicates_are_removed_unless_a_rule_was_first(tmp_path):
    found, sides = write(tmp_path, 4, verdicts={1: "words"}, copies=[0, 1, 1, 2])
    counts = {"kept": 1, "words": 1, "exact_duplicate": 1, "near_duplicate": 1}
    assert {key: count[0] for key, count in found["counts"]["s"].items()} == counts
    assert sides["train"] + sides["heldout"] == ["s/0"]


@pytest.mark.parametrize(("replaced", "text"), [(True, "name@example.com"), (False, "a@b.org")])
def test_addresses_are_replaced_in_what_is_kept(tmp_path, replaced, text):
    found, _ = write(tmp_path, 1, text="a@b.org", personal=replaced)
    (path,) = (tmp_path / "out").glob("*.parquet")
    assert [row["text"] for row in shards.rows(path)] == [text]
    assert found["counts"] == {"s": {"kept": [1, len(text)]}}


def test_repeated_passages_are_cut_out_of_what_is_kept(tmp_path):
    pytest.importorskip("pydivsufsort")
    text = "the same beginning of every text, "
    found, _ = write(tmp_path, 4, text=text + "{:d}", verdicts={0: "words"}, passages=30)
    rows = [row["text"] for path in tmp_path.glob("out/*.parquet") for row in shards.rows(path)]
    assert sorted(rows) == ["2", "3", text + "1"]
    assert found["counts"]["s"] == {"words": [1, 35], "kept": [3, 37]}


def test_document_of_repeated_passages_alone_is_removed(tmp_path):
    pytest.importorskip("pydivsufsort")
    found, _ = write(tmp_path, 2, text="the same text, word for word, each time", passages=30)
    counts = found["counts"]["s"]
    assert {key: count[0] for key, count in counts.items()} == {"kept": 1, "repeated_passages": 1}


def test_split_follows_fraction_id_and_seed(tmp_path):
    found, sides = write(tmp_path, count=400)
    assert 70 < len(sides["heldout"]) < 130
    for name in ("all", "none", "other"):
        (tmp_path / name).mkdir()
    assert write(tmp_path / "all", heldout_fraction=1.0)[1]["train"] == []
    assert not list((tmp_path / "none").glob("out/heldout-*"))
    assert write(tmp_path / "none", heldout_fraction=0.0)[1]["heldout"] == []
    other = write(tmp_path / "other", count=400, seed=1)[1]
    assert other["heldout"] != sides["heldout"] and found["sides"]["s"]["train"][0] > 200


def test_share_of_python_in_the_train_text_is_renamed_and_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(writing.renaming, "rename", lambda text, seed: text.replace("x", "y"))
    found, sides = write(tmp_path, 200, text="x {}", file="a.py", rename=0.3)
    marked = [name for name in sides["train"] if name.endswith("#renamed")]
    assert 20 < len(marked) == found["renamed"] < 70 and len(sides["train"]) > 120
    assert not any(name.endswith("#renamed") for name in sides["heldout"])
    rows = [row for path in tmp_path.glob("out/*.parquet") for row in shards.rows(path)]
    assert all(row["text"].startswith("xy"[row["id"].endswith("#renamed")]) for row in rows)
    (tmp_path / "text").mkdir()
    assert write(tmp_path / "text", text="x {}", file="a.txt", rename=1)[0]["renamed"] == 0


def test_samples_are_those_of_the_lowest_hashes(tmp_path):
    found, _ = write(tmp_path, verdicts={1: "words"})
    (source, verdict, kept), removed = found["samples"]
    ranked = sorted((sampling.position(f"s/{n}", 0), f"s/{n}") for n in range(40) if n != 1)
    assert (source, verdict) == ("s", "kept")
    assert [(place, name) for place, name, _ in kept] == ranked[:3]
    assert removed[:2] == ["s", "words"] and removed[2][0][2] == "text 00001"


@pytest.mark.parametrize("samples", [0, 1])
def test_few_samples(tmp_path, samples):
    found, _ = write(tmp_path, samples=samples)
    assert [len(texts) for *_, texts in found["samples"]] == [samples]
